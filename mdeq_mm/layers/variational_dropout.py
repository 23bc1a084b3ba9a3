"""Dropout whose mask stays the same for a whole training iteration."""

from typing import Optional

import torch
from mmengine.dist import get_dist_info
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..options import check_number, checks_options


@MODELS.register_module()
@checks_options
class VariationalDropout2d(nn.Module):
    """Drops whole channels, the same ones at every call until :meth:`reset` (paper, §3.3).

    An equilibrium exists only if f is the same function at each call, so the mask must not
    change between calls. It is drawn at the first call after a reset, one per sample and
    channel, and drawn again if batch size or channels change. Distributed processes have
    different masks, even with the same seed. ``MDEQBackbone`` resets its
    masks at each training forward; elsewhere call :func:`reset_masks` once an iteration, or let
    ``VariationalDropoutHook`` do so.

    Args:
        drop_rate (float): Probability of a channel to be dropped, in [0, 1).
    """

    def __init__(self, drop_rate: float = 0.5) -> None:
        super().__init__()
        self.drop_rate = check_number(
            'VariationalDropout2d', 'drop_rate', drop_rate, 0, 1, open_high=True
        )
        self._mask: Optional[Tensor] = None

    def reset(self) -> None:
        """Forget the mask; the next training call draws a new one."""
        self._mask = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if not self.training or self.drop_rate == 0:
            return x
        if x.dim() != 4:
            raise ValueError(f'VariationalDropout2d takes (N, C, H, W), got {tuple(x.shape)}.')
        shape = (x.shape[0], x.shape[1], 1, 1)
        if self._mask is None or self._mask.shape != shape or self._mask.device != x.device:
            keep = 1 - self.drop_rate
            # Processes mostly start from one seed: each draws for all of them and takes its part.
            rank, processes = get_dist_info()
            # Drawn in float32 and outside any graph, then used in whatever dtype x has.
            drawn = torch.empty(processes, *shape, dtype=torch.float32, device=x.device)
            self._mask = drawn.bernoulli_(keep).div_(keep)[rank]
        return x * self._mask.to(x.dtype)

    def extra_repr(self) -> str:
        return f'drop_rate={self.drop_rate}'


def reset_masks(module: nn.Module) -> None:
    """Reset every :class:`VariationalDropout2d` below ``module``."""
    for child in module.modules():
        if isinstance(child, VariationalDropout2d):
            child.reset()
