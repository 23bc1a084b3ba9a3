"""Group norm, ReLU and a convolution, without the map before it: conv(relu(norm(x)))."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .norm_relu import norm_relu
from .norms import Norm, native_gradients


def norm_relu_conv(
    x: Tensor, norm: Norm, weight: Tensor, padding: int = 0, kernel: str = 'auto'
) -> Tensor:
    """``conv2d(relu(norm(x)), weight)`` in the dtype of the convolution.

    The map between norm and convolution is the widest of f. C++ does not keep it for the gradient
    of ``weight`` but recomputes it.

    Args:
        x (Tensor): (N, C, H, W), which the caller does not need afterwards: if no gradient is
            needed, it may be overwritten.
        norm (Norm): The group norm.
        weight (Tensor): (C_out, C, k, k) of the convolution, which has a stride of 1.
        padding (int): Padding of the convolution.
        kernel (str): One of :data:`~mdeq_mm.kernels.KERNELS`.
    """
    found = backends.chosen(kernel, x, norm.weight, norm.bias, weight)
    learns = x.requires_grad or norm.learns or weight.requires_grad
    differentiated = torch.is_grad_enabled() and learns
    if found != 'cpp' or not differentiated or _is_cast(x) or torch.compiler.is_compiling():
        y = norm_relu(x, norm, kernel=kernel, inplace=True)
        return F.conv2d(y, weight, padding=padding)
    x = backends.as_map(x, x, found)
    promise = _Promise()
    weight = _PromisedGradient.apply(promise, weight.to(x.dtype))
    options = norm.groups, norm.eps, padding
    return _NormReluConv.apply(promise, options, x, norm.weight, norm.bias, weight)


def _is_cast(x: Tensor) -> bool:
    """Whether autocast would bring the map to another dtype for the convolution."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype


def _native(x: Tensor, norm: Norm, weight: Tensor, padding: int) -> Tensor:
    return F.conv2d(norm_relu(x, norm, kernel='native'), weight, padding=padding)


class _Promise:
    """How to compute the gradient of a weight in the backward pass that is under way.

    ``compute`` must hold no tensor with a graph: that of the weight leads back to the promise, and
    Python finds no cycle that passes through a graph.
    """

    def __init__(self) -> None:
        self.compute: Callable[[], Tensor] | None = None


class _PromisedGradient(torch.autograd.Function):
    """A weight whose gradient is computed when the backward pass comes here, and only then.

    A function cannot see which of its gradients a backward pass wants. The adjoint solver wants
    none of weights, in each of its many passes, and none of those comes here.
    """

    @staticmethod
    def forward(ctx: Any, promise: _Promise, weight: Tensor) -> Tensor:
        ctx.promise = promise
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        compute, ctx.promise.compute = ctx.promise.compute, None
        # Besides the zeros that stand for it, what a second differentiation adds.
        return None, grad if compute is None else compute().add_(grad)


class _NormReluConv(torch.autograd.Function):
    """Keeps x and the moments."""

    @staticmethod
    def forward(ctx, promise, options, x, scale, shift, weight):
        groups, eps, padding = options
        y, stats = backends.operations('cpp').norm_relu(x, scale, shift, groups, eps, True)
        ctx.save_for_backward(x, scale, shift, weight, stats)
        ctx.promise, ctx.options = promise, options
        return F.conv2d(y, weight, padding=padding)

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, weight, stats = ctx.saved_tensors
        groups, eps, padding = ctx.options
        needs = ctx.needs_input_grad[2:]
        ctx.promise.compute = None
        if backends.differentiates():

            def native(x, scale, shift, weight):
                return _native(x, Norm(groups, scale, shift, eps), weight, padding)

            return None, None, *native_gradients(native, (x, scale, shift, weight), needs, grad)
        ops = backends.operations('cpp')

        kept = [t if t is None else t.detach() for t in (grad, x, scale, shift, weight)]

        def weight_gradient() -> Tensor:
            grad, x, scale, shift, weight = kept
            y = ops.norm_relu(x, scale, shift, groups, eps, True)[0]
            return _conv_gradient(grad, y, weight, padding, 1)

        dx = dscale = dshift = dweight = None
        if any(needs[:3]):
            # The gradient of a convolution's input does not depend on the input.
            dy = _conv_gradient(grad, x, weight, padding, 0)
            affine = needs[1] or needs[2]
            dx, sums = ops.norm_relu_backward(dy, x, stats, scale, shift, groups, True, affine)
            dscale = sums[0].to(scale.dtype) if needs[1] else None
            dshift = sums[1].to(shift.dtype) if needs[2] else None
        if needs[3]:
            ctx.promise.compute = weight_gradient
            dweight = weight.new_zeros(()).expand_as(weight)
        return None, None, dx, dscale, dshift, dweight


def _conv_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: int, which: int) -> Tensor:
    """Gradient of a convolution's input, ``which=0``, or of its weight, 1."""
    mask = [index == which for index in range(3)]
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, mask
    )
    return grads[which]
