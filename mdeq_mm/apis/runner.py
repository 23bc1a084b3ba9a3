"""The Runner of a config, and the processes it runs in."""

import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..compat import mend_class_weights


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
