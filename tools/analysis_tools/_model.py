"""What the scripts of this folder share: a model made from a config."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

# The helpers of train.py and test.py lie one folder up, where Python does not look by itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import (
    build_runner,
    check_checkpoint,
    check_data,
    check_scales,
    fit_to_machine,
    load_config,
    merge_options,
    one_line_errors,
)
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from mdeq_mm.models import MDEQBackbone

__all__ = [
    'add_arguments',
    'build_model',
    'build_runner',
    'check_checkpoint',
    'check_data',
    'check_scales',
    'fit_to_machine',
    'load_model',
    'one_line_errors',
    'read_config',
    'the_backbone',
]


def add_arguments(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Add the flags the three scripts have in common."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that win over the config, as model.backbone.solver.max_iter=18',
    )
    if device:
        default = 'cuda' if torch.cuda.is_available() else 'cpu'
        parser.add_argument('--device', default=default, help=f'default here: {default}')
    # What load_config asks for and these scripts have no use for.
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)


def read_config(args: argparse.Namespace) -> Config:
    """Read the config the command line names, options merged.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    cfg = load_config(args)
    merge_options(cfg, args.cfg_options)
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config for one process, in evaluation mode."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def load_model(cfg: Config, checkpoint: str | None, device: str) -> nn.Module:
    """Build the model of a config and load a checkpoint, if one is given.

    Classes and palette, where they are known, are ``model.dataset_meta``: those the checkpoint
    carries, else those of the test data set.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        UnsafeCheckpointError: If loading it could run code.
        ValueError: If it cannot be read, or does not hold every weight of this model.
    """
    check_checkpoint(checkpoint)
    model = build_model(cfg)
    meta: dict[str, Any] = {}
    if checkpoint is not None:
        try:
            content = load_checkpoint(model, checkpoint, map_location='cpu', strict=True)
        except RuntimeError as error:
            raise ValueError(f'{checkpoint} is not of this config: {error}') from error
        meta = content.get('meta') or {}
    model.dataset_meta = meta.get('dataset_meta') or _dataset_meta(cfg)
    return model.to(device)


def _dataset_meta(cfg: Config) -> dict[str, Any]:
    """Classes and palette as the config's test data set states them; empty where it does not."""
    dataset = cfg.test_dataloader.dataset
    kind = dataset.type
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    return {**(getattr(kind, 'METAINFO', None) or {}), **(dataset.get('metainfo') or {})}


def the_backbone(model: nn.Module) -> MDEQBackbone:
    """Give the model's MDEQ.

    Raises:
        ValueError: If it has none, or several.
    """
    backbones = [module for module in model.modules() if isinstance(module, MDEQBackbone)]
    if len(backbones) != 1:
        raise ValueError(f'the model has {len(backbones)} MDEQBackbone modules; want exactly one')
    return backbones[0]
