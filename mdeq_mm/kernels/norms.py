"""Group norm and rectifiers by torch's operators."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """A group norm. Scale and shift are (C,) or None."""

    groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    @property
    def learns(self) -> bool:
        """Whether scale or shift needs a gradient."""
        tensors = (self.weight, self.bias)
        return any(t is not None and t.requires_grad for t in tensors)


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype of computations on a map: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def native_norm(x: Tensor, norm: Norm) -> Tensor:
    """Group norm by torch, (N, C, ...) in and out, in the dtype of ``x`` even under autocast."""
    device = x.device.type
    # The meta device, used for counting, has no autocast.
    if device == 'meta' or not torch.is_autocast_enabled(device):
        return _group_norm(x, norm)
    with torch.autocast(device, enabled=False):
        return _group_norm(x, norm)


def _group_norm(x: Tensor, norm: Norm) -> Tensor:
    weight, bias = norm.weight, norm.bias
    # Only the CPU kernel takes float32 scales with low-precision maps.
    if weight is not None and weight.dtype != x.dtype and x.device.type != 'cpu':
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    # F.group_norm refuses groups of one value. Here they are valid: such a group, as of an image of
    # one pixel, is normalized to zero.
    return torch.group_norm(x, norm.groups, weight, bias, norm.eps)


def native_rectify(x: Tensor, smooth: bool) -> Tensor:
    """Softplus, or ReLU in place."""
    return F.softplus(x) if smooth else F.relu(x, inplace=True)


def native_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` that can be differentiated again.

    Args:
        function: A function made of torch's operators.
        inputs: Its arguments.
        needs: Which of ``inputs`` need a gradient; None is returned for the others.
        grad (Tensor): Gradient of the result.
    """
    if not any(needs):
        return [None] * len(needs)
    # Views, so that the gradient stops here even if one input was computed from another.
    views = [x.view_as(x) if need else x for x, need in zip(inputs, needs)]
    with torch.enable_grad():
        out = function(*views)
    wanted = [view for view, need in zip(views, needs) if need]
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needs]
