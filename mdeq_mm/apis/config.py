"""A config made ready to run: read, options merged, fitted to the machine."""

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from ..compat import force_safe_loading
from ..optim import has_bfloat16
from ..registry import type_name

DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# Top-level names of a config from which its data loaders and preprocessor were made, and the keys
# that received the value.
_SHARED_VALUES = dict(data_root=('data_root',), crop_size=('crop_size', 'size'))
# Names of batch norms over all processes: MM's, mmcv's, and that of torch's and mmcv's class.
_SYNC_NORMS = ('SyncBN', 'MMSyncBN', 'SyncBatchNorm')
_PROJECTS = ('mmseg', 'mmpretrain', 'mmdet')


def load_config(
    path: str,
    work_dir: str | None = None,
    launcher: str = 'none',
    options: dict[str, Any] | None = None,
) -> Config:
    """Read a config and set its ``work_dir`` and ``launcher``.

    A config without a ``default_scope``, as pure-Python configs may be, gets that of its model:
    tools and data loaders ask it which project they work for.

    From here on, this process loads checkpoints as plain data only.

    Args:
        path: The config file.
        work_dir: Folder for logs and results. By default the config's own, else
            ``work_dirs/NAME``.
        launcher: What started the processes: none, pytorch, slurm or mpi.
        options: The ``--cfg-options``, for a tool that has no other flags which set config values.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'config {path} does not exist')
    force_safe_loading()
    cfg = Config.fromfile(path)
    if cfg.get('default_scope') is None:
        cfg.default_scope = _project_of(cfg.get('model'))
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(path).stem)
    merge_options(cfg, options)
    return cfg


def _project_of(model: dict[str, Any] | None) -> str | None:
    """The project of OpenMMLab whose model this is, by the class or the dotted name of its type."""
    kind = (model or {}).get('type')
    classes = inspect.getmro(kind) if inspect.isclass(kind) else ()
    homes = [base.__module__ for base in classes] or [str(kind)]
    roots = [home.split('.')[0] for home in homes]
    return next((root for root in roots if root in _PROJECTS), None)


def dataloaders(cfg: Config) -> list[ConfigDict]:
    """The settings of the data loaders that a config has."""
    return [cfg[name] for name in DATALOADERS if cfg.get(name) is not None]


def set_dataloader_defaults(
    cfg: Config, pin_memory: bool = True, persistent_workers: bool = True
) -> None:
    """Fill in the defaults of mmsegmentation's and mmpretrain's own tools for every data loader.

    Args:
        cfg: The config, changed in place.
        pin_memory: False turns it off whatever the config says.
        persistent_workers: False turns them off whatever the config says.
    """
    for loader in dataloaders(cfg):
        loader.setdefault('pin_memory', torch.cuda.is_available())
        if cfg.get('default_scope') == 'mmpretrain':
            loader.setdefault('persistent_workers', True)
            loader.setdefault('collate_fn', dict(type='default_collate'))
        if not pin_memory:
            loader.pin_memory = False
        if not persistent_workers:
            loader.persistent_workers = False


def merge_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Apply ``--cfg-options``, the last word on every setting.

    A config's data loaders are made from ``data_root`` and ``crop_size`` when it is read, so
    changing these names later would have no effect by itself. Here the new value replaces the old
    one everywhere it still stands, except where another option names the place.

    Args:
        cfg: The config, changed in place.
        options: Dotted names and values.
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


def fit_to_machine(cfg: Config) -> None:
    """Adapt settings made for GPUs to a machine without one, and to what torch allows.

    On one process the Runner itself turns SyncBN into BN. Across processes on CPUs nothing does,
    and PyTorch has no SyncBN there: each process then normalizes by its own batch.

    Args:
        cfg: The config, changed in place.

    Raises:
        ValueError: If the launcher needs a GPU and there is none.
    """
    for loader in dataloaders(cfg):
        if loader.get('num_workers', 0) == 0:
            loader.persistent_workers = False
    _warn_of_slow_bfloat16(cfg)
    if torch.cuda.is_available() or cfg.launcher == 'none':
        return
    if cfg.launcher != 'pytorch':
        raise ValueError(
            f'--launcher {cfg.launcher} without a GPU: only --launcher pytorch works on CPUs'
        )
    if _unsynchronize(cfg.model):
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
    # By default the Runner gives each process the GPU of its rank.
    cfg.setdefault('model_wrapper_cfg', default_wrapper).device_ids = None


def _unsynchronize(node: Any) -> bool:
    """Replace batch norms over all processes inside ``node`` by plain ones; whether any were."""
    if isinstance(node, dict):
        found = type_name(node) in _SYNC_NORMS
        if found:
            node['type'] = 'BN'
        node = list(node.values())
    else:
        found = False
    if isinstance(node, (list, tuple)):
        found = any([_unsynchronize(value) for value in node]) or found
    return found


def _warn_of_slow_bfloat16(cfg: Config) -> None:
    """Say that mixed precision, bfloat16 on a CPU, is slow where no instructions are for it."""
    loops = [name for name in ('val_cfg', 'test_cfg') if (cfg.get(name) or {}).get('fp16')]
    if not loops or has_bfloat16():
        return
    print_log(
        f'This CPU has no instructions for bfloat16, which {loops[0]}.fp16 (--amp of test.py) asks '
        'for: it can take ten times as long as float32. Leave it out.',
        logger='current',
        level=logging.WARNING,
    )
