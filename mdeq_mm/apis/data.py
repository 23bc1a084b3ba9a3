"""Check that data sets exist before anything is built."""

import inspect
import os
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope


def check_data(
    cfg: Config, names: tuple[str, ...], option: str = '--cfg-options data_root=FOLDER'
) -> None:
    """Check that the data sets exist before anything is built.

    Args:
        cfg: The config, options merged.
        names: The data loaders that will be used.
        option: What of the caller's command line names another folder.

    Raises:
        FileNotFoundError: If a folder does not exist. The message names it and the remedy.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    for name in names:
        if cfg.get(name) is not None:
            for dataset in inner_datasets(cfg[name].get('dataset')):
                if dataset.get('data_root'):
                    _check_dataset(name, dataset, option)


def dataset_class(dataset: dict) -> Any:
    """The class that a data set's config names; None if no imported project has it."""
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    return kind


def inner_datasets(node: Any) -> Iterator[dict]:
    """Yield the data sets inside wrappers such as ConcatDataset, or the one that has no wrapper."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from inner_datasets(item)
    elif isinstance(node, dict):
        inner = [node[key] for key in ('dataset', 'datasets') if node.get(key) is not None]
        if inner:
            yield from inner_datasets(inner)
        else:
            yield node


def test_dataset(cfg: Config) -> dict | None:
    """The first data set that a config tests with, or else validates with; None if it does neither.

    Its pipeline and its classes are those of an image of one's own.
    """
    for name in ('test_dataloader', 'val_dataloader'):
        found = next(inner_datasets((cfg.get(name) or {}).get('dataset')), None)
        if found is not None:
            return found
    return None


def _check_dataset(name: str, dataset: dict, option: str) -> None:
    """Check the folders of one data set, unless it is remote or downloads itself."""
    root = str(dataset['data_root'])
    if '://' in root or dataset.get('backend_args') or _downloads(dataset):
        return
    prefixes = dataset.get('data_prefix') or ''
    prefixes = list(prefixes.values()) if isinstance(prefixes, dict) else [prefixes]
    for path in (root, *(os.path.join(root, prefix or '') for prefix in prefixes)):
        if not os.path.isdir(path) or not any(os.scandir(path)):
            state = 'is empty' if os.path.isdir(path) else 'does not exist'
            raise FileNotFoundError(
                f'{name} wants the folder {path}, which {state}. See docs/data.md for '
                f'where to get it, or name yours by {option}'
            )


def _downloads(dataset: dict) -> bool:
    """Whether the data set's class downloads missing data by itself."""
    kind = dataset_class(dataset)
    if not inspect.isclass(kind):
        return False
    return 'download' in inspect.signature(kind).parameters and dataset.get('download', True)
