"""Dropout whose mask stays the same for a whole forward pass."""

import torch
from mmengine.dist import get_dist_info
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..deq.passes import Pass, current_pass
from ..options import check_number, checks_options


@MODELS.register_module()
@checks_options
class VariationalDropout2d(nn.Module):
    """Drops whole channels, the same ones at every call of a forward pass (paper, §3.3).

    An equilibrium exists only if f is the same function at each call, so the mask must not change
    between calls. In training mode, each forward pass of an ``ImplicitLayer`` draws a new mask, per
    sample and channel. Distributed processes have different masks, even with the same seed. Outside
    an implicit layer a mask is kept until :meth:`reset`: call :func:`reset_masks` once per
    iteration.

    Args:
        drop_rate (float): Probability that a channel is dropped, in [0, 1).
    """

    def __init__(self, drop_rate: float = 0.5) -> None:
        super().__init__()
        self.drop_rate = check_number(
            'VariationalDropout2d', 'drop_rate', drop_rate, 0, 1, open_high=True
        )
        self._masks: dict[tuple, Tensor] = {}
        # Shared by all copies that a forward pass makes of this module.
        self._key = object()
        # Whether this is a copy made for a pass.
        self._bound = False

    def reset(self) -> None:
        """Forget the masks; the next training call draws a new one."""
        self._masks = {}

    def begin_pass(self, current: Pass | None) -> None:
        """Called on the copy that a forward pass makes of this module."""
        self._masks = {} if current is None else current.values.setdefault(self._key, {})
        self._bound = True

    def mask(self, x: Tensor) -> Tensor | None:
        """The mask (N, C, 1, 1) for ``x`` (N, C, H, W); None in evaluation mode.

        Entries are 0 or ``1 / (1 - drop_rate)``.
        """
        if not self.training or self.drop_rate == 0:
            return None
        if x.dim() != 4:
            raise ValueError(f'VariationalDropout2d takes (N, C, H, W), got {tuple(x.shape)}.')
        if torch.compiler.is_dynamo_compiling() and not self._bound:
            # Compiled code would keep the masks of one pass for all.
            return _uncompiled_mask(self, x)
        return self._mask(x)

    def _mask(self, x: Tensor) -> Tensor:
        masks = self._masks
        # Compiled code runs on a copy, which has the masks of its pass.
        current = None if self._bound else current_pass()
        if current is not None:
            # Kept here as well for calls after the pass: activation checkpointing repeats f then.
            masks = self._masks = current.values.setdefault(self._key, {})
        # One for each shape: f may use the module at several scales.
        key = (x.shape[0], x.shape[1], str(x.device))
        if key not in masks:
            masks[key] = self._draw((x.shape[0], x.shape[1], 1, 1), x.device)
        return masks[key].to(x.dtype)

    def _draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        keep = 1 - self.drop_rate
        # Processes usually share one seed, so each draws the masks of all of them and takes its
        # own.
        rank, processes = get_dist_info()
        # Drawn in float32 outside any graph, then used in the dtype of x.
        drawn = torch.empty(processes, *shape, dtype=torch.float32, device=device)
        return drawn.bernoulli_(keep).div_(keep)[rank]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        mask = self.mask(x)
        return x if mask is None else x * mask

    def extra_repr(self) -> str:
        return f'drop_rate={self.drop_rate}'


@torch.compiler.disable
def _uncompiled_mask(module: VariationalDropout2d, x: Tensor) -> Tensor:
    return module._mask(x)


def reset_masks(module: nn.Module) -> None:
    """Reset every :class:`VariationalDropout2d` below ``module``."""
    for child in module.modules():
        if isinstance(child, VariationalDropout2d):
            child.reset()
