"""Group norm and ReLU: relu(norm(x))."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .norms import Norm, native_gradients, native_norm


def norm_relu(
    x: Tensor, norm: Norm, relu: bool = True, kernel: str = 'auto', inplace: bool = False
) -> Tensor:
    """``relu(norm(x))``, or ``norm(x)`` alone, in the dtype of ``x``.

    Args:
        x (Tensor): (N, C, H, W).
        norm (Norm): The group norm.
        relu (bool): Rectify.
        kernel (str): One of :data:`~mdeq_mm.kernels.KERNELS`.
        inplace (bool): The caller does not need ``x`` afterwards. If no gradient is needed, the
            result may overwrite it.
    """
    kernel = backends.chosen(kernel, x, norm.weight, norm.bias)
    if kernel == 'native':
        return _native(x, norm, relu)
    x = backends.as_map(x, x, kernel)
    differentiated = torch.is_grad_enabled() and (x.requires_grad or norm.learns)
    if not differentiated and inplace and kernel == 'cpp' and not torch.compiler.is_compiling():
        torch.ops.mdeq_mm.norm_relu_(x, norm.weight, norm.bias, norm.groups, norm.eps, relu)
        return x
    return _NormRelu.apply(kernel, norm.groups, norm.eps, relu, x, norm.weight, norm.bias)


def _native(x: Tensor, norm: Norm, relu: bool) -> Tensor:
    out = native_norm(x, norm)
    return F.relu(out, inplace=True) if relu else out


class _NormRelu(torch.autograd.Function):
    """Keeps x and the moments. The sign that ReLU saw is recomputed from them."""

    @staticmethod
    def forward(ctx, kernel, groups, eps, relu, x, weight, bias):
        ops = backends.operations(kernel)
        y, stats = ops.norm_relu(x, weight, bias, groups, eps, relu)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.options = kernel, groups, eps, relu
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, stats = ctx.saved_tensors
        kernel, groups, eps, relu = ctx.options
        needs = ctx.needs_input_grad[4:]
        if backends.differentiates():

            def native(x, weight, bias):
                return _native(x, Norm(groups, weight, bias, eps), relu)

            grads = native_gradients(native, (x, weight, bias), needs, grad)
            return None, None, None, None, *grads
        ops = backends.operations(kernel)
        wanted = needs[1] or needs[2]
        dx, parameters = ops.norm_relu_backward(grad, x, stats, weight, bias, groups, relu, wanted)
        dweight = parameters[0].to(weight.dtype) if needs[1] else None
        dbias = parameters[1].to(bias.dtype) if needs[2] else None
        return None, None, None, None, dx, dweight, dbias
