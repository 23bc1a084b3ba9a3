"""Convolutions of 3x3, in C++ by Winograd's method, and gradients that only some passes compute."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .norms import native_gradients

# Below this many tiles of 2x2 pixels, to transform the weight costs more than is gained. Counted
# over the batch: whose maps are so small may differ by rounding from the same image alone.
_FEWEST_TILES = 64


def conv2d(x: Tensor, weight: Tensor, padding: int, kernel: str = 'auto') -> Tensor:
    """``torch.nn.functional.conv2d`` with a stride of 1.

    In C++ convolutions of 3x3 on float32 and float64 maps take 16 multiplications where the
    definition has 36 (Lavin & Gray 2016), at no loss of precision. All others are torch's.

    Args:
        x (Tensor): (N, C, H, W).
        weight (Tensor): (K, C, k, k).
        padding (int): Rows and columns of zeros on each side.
        kernel (str): One of :data:`~mdeq_mm.kernels.KERNELS`.
    """
    found = backends.chosen(kernel, x, weight)
    if found != 'cpp' or torch.compiler.is_compiling() or not _suits(x, weight, padding):
        return F.conv2d(x, weight, padding=padding)
    if is_cast(x):
        return F.conv2d(x, weight, padding=padding)
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return convolved(x, weight, padding)
    promise = Promise()
    return _Conv.apply(promise, padding, x, PromisedGradient.apply(promise, weight))


def is_cast(x: Tensor) -> bool:
    """Whether autocast would bring a map to another dtype for a convolution."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype


def _suits(x: Tensor, weight: Tensor, padding: int) -> bool:
    """Whether the operation in C++ is for this convolution."""
    if weight.shape[2:] != (3, 3) or padding != 1 or x.dtype != weight.dtype:
        return False
    tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    return x.dtype in (torch.float32, torch.float64) and tiles >= _FEWEST_TILES


def convolved(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """The convolution of a map on a CPU, without a graph."""
    if _suits(x, weight, padding):
        return backends.operations('cpp').conv3x3(x, weight, False)
    return F.conv2d(x, weight, padding=padding)


def input_gradient(grad: Tensor, like: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Gradient of the input of a convolution, a map of the size of ``like``."""
    if _suits(like, weight, padding):
        return backends.operations('cpp').conv3x3(grad, weight, True)
    # It does not depend on the input's values.
    return _gradient(grad, like, weight, padding, 0)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Gradient of the weight of a convolution."""
    return _gradient(grad, x, weight, padding, 1)


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: int, which: int) -> Tensor:
    mask = [index == which for index in range(3)]
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, mask
    )
    return grads[which]


class Promise:
    """How to compute the gradient of a weight in the backward pass that is under way.

    ``compute`` must hold no tensor with a graph: that of the weight leads back to the promise, and
    Python finds no cycle that passes through a graph.
    """

    def __init__(self) -> None:
        self.compute: Callable[[], Tensor] | None = None


class PromisedGradient(torch.autograd.Function):
    """A weight whose gradient is computed when the backward pass comes here, and only then.

    A function cannot see which of its gradients a backward pass wants. The adjoint solver wants
    none of weights, in each of its many passes, and none of those comes here.
    """

    @staticmethod
    def forward(ctx: Any, promise: Promise, weight: Tensor) -> Tensor:
        ctx.promise = promise
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        compute, ctx.promise.compute = ctx.promise.compute, None
        # Besides the zeros that stand for it, what a second differentiation adds.
        return None, grad if compute is None else compute().add_(grad)


class _Conv(torch.autograd.Function):
    """Keeps its inputs."""

    @staticmethod
    def forward(ctx, promise, padding, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.promise, ctx.padding = promise, padding
        return convolved(x, weight, padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        padding, needs = ctx.padding, ctx.needs_input_grad[2:]
        ctx.promise.compute = None
        if backends.differentiates():

            def native(x, weight):
                return F.conv2d(x, weight, padding=padding)

            return None, None, *native_gradients(native, (x, weight), needs, grad)
        dx = input_gradient(grad, x, weight, padding) if needs[0] else None
        dweight = None
        if needs[1]:
            given = grad.detach(), x.detach(), weight.detach()
            ctx.promise.compute = lambda: weight_gradient(*given, padding)
            dweight = weight.new_zeros(()).expand_as(weight)
        return None, None, dx, dweight
