"""What train.py, test.py and demo.py share: flags, and a config made ready to run."""

import argparse
import copy
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# First of the OpenMMLab imports: it says what is wrong with an environment that lacks one.
try:
    from mdeq_mm.compat import (
        UnsafeCheckpointError,
        force_safe_loading,
        mend_class_weights,
        verify_checkpoint,
    )
except ModuleNotFoundError as error:
    if error.name != 'mdeq_mm':
        raise
    sys.exit('mdeq_mm is not installed here: run "pip install -e ." in its repository, or "make"')
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import print_log
from mmengine.registry import DATASETS, RUNNERS, init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint

DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# Names at the top of a config that its data loaders and preprocessor were made from, and the keys
# under which the value went in.
_SHARED_VALUES = dict(data_root=('data_root',), crop_size=('crop_size', 'size'))


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags train.py and test.py have in common."""
    parser.add_argument('--work-dir', help='folder for logs and results')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='turn off pin_memory of the data loaders'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that win over the config and over the other flags, as '
        'model.backbone.solver.max_iter=18; lists as key="[a,b]" or key=a,b',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes',
    )
    # torchrun sets LOCAL_RANK; the older launcher passes one spelling or the other.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a wrong argument, file or setting into one line and exit status 1.

    Only for the preparation: an error out of the training itself keeps its traceback.
    """
    try:
        yield
    except (FileNotFoundError, ValueError, UnsafeCheckpointError) as error:
        sys.exit(f'{program}: {error}')


def load_config(args: argparse.Namespace) -> Config:
    """Read the config the command line names and settle its work_dir and launcher.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    if not Path(args.config).is_file():
        raise FileNotFoundError(f'config {args.config} does not exist')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    force_safe_loading()
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def set_dataloader_defaults(cfg: Config, args: argparse.Namespace) -> None:
    """Fill in what the projects' own tools give to every data loader."""
    for loader in present_dataloaders(cfg):
        loader.setdefault('pin_memory', torch.cuda.is_available())
        if cfg.get('default_scope') == 'mmpretrain':
            loader.setdefault('persistent_workers', True)
            loader.setdefault('collate_fn', dict(type='default_collate'))
        if args.no_pin_memory:
            loader.pin_memory = False
        if getattr(args, 'no_persistent_workers', False):
            loader.persistent_workers = False


def merge_options(cfg: Config, options: dict | None) -> None:
    """Apply ``--cfg-options``, the last word on every setting.

    A config's data loaders are made from ``data_root`` and ``crop_size`` when it is read, so that
    a later change of these names alone would change nothing. Here it reaches every place that
    still has the old value, unless another option names that place.
    """
    if not options:
        return
    for name, keys in _SHARED_VALUES.items():
        old = cfg.get(name)
        if name in options and old is not None:
            for part in ('data_preprocessor', 'model', 'tta_pipeline', *DATALOADERS):
                _replace(cfg.get(part), keys, old, options[name])
    cfg.merge_from_dict(options)


def _replace(node: Any, keys: tuple[str, ...], old: Any, new: Any) -> None:
    """Replace ``old`` by ``new`` under the given keys, everywhere inside ``node``."""

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, (list, tuple)) else value

    if isinstance(node, dict):
        for key, value in node.items():
            if key in keys and plain(value) == plain(old):
                node[key] = plain(new)
            else:
                _replace(value, keys, old, new)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _replace(value, keys, old, new)


def present_dataloaders(cfg: Config) -> list[ConfigDict]:
    """Give the settings of the data loaders a config has."""
    return [cfg[name] for name in DATALOADERS if cfg.get(name) is not None]


def fit_to_machine(cfg: Config) -> None:
    """Adapt settings made for GPUs to a machine without one, and torch's own conditions.

    On one process the Runner itself turns SyncBN into BN. Across processes on CPUs nothing does,
    and PyTorch has no SyncBN there: each process then normalises by its own batch.
    """
    for loader in present_dataloaders(cfg):
        if loader.get('num_workers', 0) == 0:
            loader.persistent_workers = False
    if torch.cuda.is_available() or cfg.launcher == 'none':
        return
    if cfg.launcher != 'pytorch':
        raise ValueError(
            f'--launcher {cfg.launcher} without a GPU: only --launcher pytorch works on CPUs'
        )
    given = copy.deepcopy(cfg.model)
    for sync_type in ('SyncBN', 'MMSyncBN'):
        _replace(cfg.model, ('type',), sync_type, 'BN')
    if cfg.model != given:
        print_log(
            'PyTorch has no SyncBN for CPUs: the model trains with BN instead, each process '
            'normalizing by its own part of the batch.',
            logger='current',
            level=logging.WARNING,
        )
    cfg.setdefault('env_cfg', ConfigDict()).setdefault('dist_cfg', ConfigDict())
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    default_wrapper = ConfigDict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    # The Runner by itself gives each process the GPU of its rank.
    cfg.setdefault('model_wrapper_cfg', default_wrapper).device_ids = None


def check_data(cfg: Config, names: tuple[str, ...]) -> None:
    """Look for the data sets before anything is built.

    Args:
        cfg: The config, options merged.
        names: The data loaders that will be used.

    Raises:
        FileNotFoundError: If a folder does not exist; names it and the remedy.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    for name in names:
        if cfg.get(name) is not None:
            for dataset in _datasets_in(cfg[name].get('dataset')):
                _check_dataset(name, dataset)


def _datasets_in(node: Any) -> Iterator[dict]:
    """Give every data set inside the wrappers (repeated, concatenated, ...)."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _datasets_in(item)
    elif isinstance(node, dict):
        if node.get('data_root'):
            yield node
        for key in ('dataset', 'datasets'):
            yield from _datasets_in(node.get(key))


def _check_dataset(name: str, dataset: dict) -> None:
    """Check the folders of one data set, unless it is remote or fetches itself."""
    root = str(dataset['data_root'])
    if '://' in root or dataset.get('backend_args') or _downloads(dataset):
        return
    prefixes = dataset.get('data_prefix') or ''
    prefixes = list(prefixes.values()) if isinstance(prefixes, dict) else [prefixes]
    for path in (root, *(os.path.join(root, prefix or '') for prefix in prefixes)):
        if not os.path.isdir(path) or not any(os.scandir(path)):
            state = 'is empty' if os.path.isdir(path) else 'does not exist'
            raise FileNotFoundError(
                f'{name} wants the folder {path}, which {state}. See "Train and '
                'evaluate" in README.md for how to make it, or name yours by --cfg-options '
                'data_root=FOLDER'
            )


def _downloads(dataset: dict) -> bool:
    """Tell whether the data set's class fetches missing data by itself."""
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    if not inspect.isclass(kind):
        return False
    return 'download' in inspect.signature(kind).parameters and dataset.get('download', True)


def check_scales(model: dict) -> None:
    """Compare the scales that neck and heads expect with those an MDEQ backbone returns.

    Args:
        model: The model's config.

    Raises:
        ValueError: If they disagree, which MM would notice in the first iteration only.
    """
    backbone = model.get('backbone') or {}
    channels, out_indices = backbone.get('channels'), backbone.get('out_indices')
    if backbone.get('type') != 'MDEQBackbone' or channels is None:
        return
    if out_indices is None:
        out_indices = range(len(channels))
    if not all(0 <= i < len(channels) for i in out_indices):
        return  # the backbone says what is wrong with that
    out = [channels[i] for i in out_indices]
    necks = model.get('neck') or []
    for part in necks if isinstance(necks, (list, tuple)) else [necks]:
        if part.get('type') == 'MDEQFuseNeck' and list(part.get('in_channels', out)) != out:
            raise ValueError(
                f'model.neck.in_channels is {list(part.in_channels)}, but the backbone returns '
                f'scales of {out} channels; make them equal'
            )
    if necks:
        return
    for name in ('decode_head', 'auxiliary_head'):
        heads = model.get(name) or []
        for head in heads if isinstance(heads, (list, tuple)) else [heads]:
            _check_head_scales(name, head, out)


def _check_head_scales(name: str, head: dict, out: list[int]) -> None:
    """Compare ``in_channels`` and ``in_index`` of one mmseg head with the backbone's scales."""
    wanted, index = head.get('in_channels'), head.get('in_index', -1)
    if wanted is None:
        return
    wanted = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    index = list(index) if isinstance(index, (list, tuple)) else [index]
    scales = [out[i] if -len(out) <= i < len(out) else None for i in index]
    if wanted != scales:
        raise ValueError(
            f'model.{name} takes in_channels={wanted} at in_index={index}, but the backbone '
            f'returns {len(out)} scales of {out} channels; give in_channels and in_index that '
            'name these scales, or change model.backbone.channels'
        )


def pretrained_files(node: Any) -> Iterator[str]:
    """Give the files that ``init_cfg=dict(type='Pretrained', ...)`` anywhere in a model names."""
    if isinstance(node, dict):
        if node.get('type') == 'Pretrained' and isinstance(node.get('checkpoint'), str):
            yield node['checkpoint']
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from pretrained_files(value)


def check_checkpoint(path: str | None) -> None:
    """Check a checkpoint file before anything is built; an address is left to the Runner.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
        UnsafeCheckpointError: If loading it could run code.
    """
    if path is None or '://' in path:
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    verify_checkpoint(path)


def find_whole_checkpoint(work_dir: str) -> str | None:
    """Find the checkpoint to go on from: the latest, or if it is damaged the one before it.

    Args:
        work_dir: Folder of the interrupted run. Its file ``last_checkpoint`` names the latest.

    Returns:
        Path of a whole checkpoint; None if the folder has none and names none.

    Raises:
        UnsafeCheckpointError: If loading the latest could run code.
        ValueError: If the latest is damaged and no other whole; names it and the remedy.
    """
    latest = find_latest_checkpoint(work_dir) or None
    damage = 'The run broke off before it named its latest checkpoint in last_checkpoint.'
    if latest is not None:
        try:
            check_checkpoint(latest)
            return latest
        except FileNotFoundError as error:
            damage = f'{error}.'
        except ValueError as error:
            damage = str(error)
    for path in _checkpoints_in({work_dir, os.path.dirname(latest or '') or work_dir}):
        iteration = None if path == latest else _resumable_iteration(path)
        if iteration is not None:
            if os.environ.get('RANK', '0') == '0':
                text = f'--resume: {damage} Going on from {path}; all after iteration {iteration} '
                print(f'WARNING: {text}is trained again.', file=sys.stderr)
            return path
    if latest is None:
        return None
    raise ValueError(
        f'--resume: {damage} No other whole checkpoint is in {work_dir}. Name one by --resume '
        'CHECKPOINT, or train from the beginning without --resume.'
    )


def _resumable_iteration(path: str) -> int | None:
    """Iteration a training can go on from with this file; None if it cannot."""
    try:
        content = verify_checkpoint(path)
    except (ValueError, UnsafeCheckpointError):
        return None
    # What save_best keeps are weights alone.
    resumable = {'state_dict', 'optimizer', 'message_hub', 'meta'} <= content.keys()
    return content['meta'].get('iter') if resumable else None


def _checkpoints_in(folders: set[str]) -> list[str]:
    """Checkpoint files, those of the highest epoch or iteration in their name first."""

    def number(path: Path) -> int:
        found = re.findall(r'\d+', path.stem)
        return int(found[-1]) if found else -1

    paths = [path for folder in sorted(folders) for path in Path(folder).glob('*.pth')]
    return [str(path) for path in sorted(paths, key=number, reverse=True)]


def build_runner(cfg: Config) -> Runner:
    """Build the Runner, in a process group of its own making where there is no GPU."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available() and not distributed:
        # The Runner's own start of a process group selects a GPU first.
        torch.distributed.init_process_group('gloo')
    if cfg.get('default_scope') == 'mmseg':
        import mmseg.models  # noqa: F401

        mend_class_weights()
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


def leave_process_group() -> None:
    """End the process group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A process that ends while another still works can be torn down in the middle of its exit.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
