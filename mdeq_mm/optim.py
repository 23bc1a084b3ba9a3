"""An optimizer wrapper: training in bfloat16 on whatever device a model is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


def has_bfloat16(device: str | None = None) -> bool:
    """Whether a device has instructions for bfloat16; a CPU without them takes ten times as long.

    Args:
        device (str | None): Such as 'cpu' or 'cuda'; None for the one on which MM's tools run.
    """
    if (device or get_device()) != 'cpu':
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Computes losses under autocast to bfloat16, on a CPU as on a GPU.

    mmengine's ``AmpOptimWrapper`` needs a GPU. It scales losses, too, which bfloat16 does not want:
    it has the range of float32.

    Args:
        dtype (str | torch.dtype): As ``AmpOptimWrapper`` has it; bfloat16 is the only one.
        **kwargs: Those of :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ValueError: Another dtype.
    """

    def __init__(self, dtype: str | torch.dtype = 'bfloat16', **kwargs: Any) -> None:
        if dtype not in ('bfloat16', torch.bfloat16):
            raise ValueError(
                f'dtype={dtype!r}: BFloat16OptimWrapper trains in bfloat16 alone; float16 wants '
                'losses scaled, as AmpOptimWrapper does on a GPU'
            )
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context in which mmengine computes a loss.

        Args:
            model (nn.Module): The model that is trained.
        """
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
