"""The Runner of a config, and its process group."""

import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..compat import patch_class_weights


def build_runner(cfg: Config) -> Runner:
    """Build the Runner. Without a GPU its process group is made here."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available() and not distributed:
        # The Runner would select a GPU before it makes a process group.
        torch.distributed.init_process_group('gloo')
    if cfg.get('default_scope') == 'mmseg':
        import mmseg.models  # noqa: F401

        patch_class_weights()
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


def leave_process_group() -> None:
    """End the process group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A process that exits while another is still working may be killed in the middle of its
        # exit.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
