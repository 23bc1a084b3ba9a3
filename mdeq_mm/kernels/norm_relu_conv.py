"""Group norm, ReLU and a convolution, without the map before it: conv(relu(norm(x)))."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .convolution import (
    Promise,
    PromisedGradient,
    conv2d,
    convolved,
    input_gradient,
    is_cast,
    weight_gradient,
)
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
    if found != 'cpp' or not differentiated or is_cast(x) or torch.compiler.is_compiling():
        y = norm_relu(x, norm, kernel=kernel, inplace=True)
        return conv2d(y, weight, padding, kernel)
    x = backends.as_map(x, x, found)
    promise = Promise()
    weight = PromisedGradient.apply(promise, weight.to(x.dtype))
    options = norm.groups, norm.eps, padding
    return _NormReluConv.apply(promise, options, x, norm.weight, norm.bias, weight)


def _native(x: Tensor, norm: Norm, weight: Tensor, padding: int) -> Tensor:
    return F.conv2d(norm_relu(x, norm, kernel='native'), weight, padding=padding)


class _NormReluConv(torch.autograd.Function):
    """Keeps x and the moments."""

    @staticmethod
    def forward(ctx, promise, options, x, scale, shift, weight):
        groups, eps, padding = options
        y, stats = backends.operations('cpp').norm_relu(x, scale, shift, groups, eps, True)
        ctx.save_for_backward(x, scale, shift, weight, stats)
        ctx.promise, ctx.options = promise, options
        return convolved(y, weight, padding)

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

        def gradient_of_weight() -> Tensor:
            grad, x, scale, shift, weight = kept
            y = ops.norm_relu(x, scale, shift, groups, eps, True)[0]
            return weight_gradient(grad, y, weight, padding)

        dx = dscale = dshift = dweight = None
        if any(needs[:3]):
            dy = input_gradient(grad, x, weight, padding)
            affine = needs[1] or needs[2]
            dx, sums = ops.norm_relu_backward(dy, x, stats, scale, shift, groups, True, affine)
            dscale = sums[0].to(scale.dtype) if needs[1] else None
            dshift = sums[1].to(shift.dtype) if needs[2] else None
        if needs[3]:
            ctx.promise.compute = gradient_of_weight
            dweight = weight.new_zeros(()).expand_as(weight)
        return None, None, dx, dscale, dshift, dweight
