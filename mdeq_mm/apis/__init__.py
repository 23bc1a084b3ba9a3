"""What the tools share: a config made ready to run, checks of data and files, models by config."""

from ..models.scales import check_scales
from ..registry import type_name
from .arguments import (
    add_cfg_options,
    add_device_argument,
    add_run_arguments,
    one_line_errors,
)
from .checkpoints import (
    check_checkpoint,
    find_resumable_checkpoint,
    given_or_packaged,
    pretrained_files,
)
from .config import (
    DATALOADERS,
    fit_to_machine,
    load_config,
    merge_options,
    set_dataloader_defaults,
)
from .data import check_data, inner_datasets
from .dataset_folder import write_dataset
from .model import build_model, evaluations_allowed, find_backbone, load_model
from .runner import build_runner, leave_process_group
from .sweep import spectral_radii, sweep_evaluations

__all__ = [
    'DATALOADERS',
    'add_cfg_options',
    'add_device_argument',
    'add_run_arguments',
    'build_model',
    'build_runner',
    'check_checkpoint',
    'check_data',
    'check_scales',
    'evaluations_allowed',
    'find_backbone',
    'find_resumable_checkpoint',
    'fit_to_machine',
    'given_or_packaged',
    'inner_datasets',
    'leave_process_group',
    'load_config',
    'load_model',
    'merge_options',
    'one_line_errors',
    'pretrained_files',
    'set_dataloader_defaults',
    'spectral_radii',
    'sweep_evaluations',
    'type_name',
    'write_dataset',
]
