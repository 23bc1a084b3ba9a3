"""The end of a residual block (paper, Eq. 5): norm3(rectify(norm2(x * mask + injection) + z))."""

import torch
from torch import Tensor

from . import backends
from .norms import Norm, native_gradients, native_norm, native_rectify


def residual_norms(
    x: Tensor,
    z: Tensor,
    norm2: Norm,
    norm3: Norm,
    injection: Tensor | None = None,
    mask: Tensor | None = None,
    smooth: bool = False,
    kernel: str = 'auto',
) -> Tensor:
    """``norm3(rectify(norm2(x * mask + injection) + z))`` in the dtype of ``x``.

    Args:
        x (Tensor): (N, C, H, W), the output of the block's second convolution.
        z (Tensor): (N, C, H, W), the block's input.
        norm2 (Norm): The group norm before ``z`` is added.
        norm3 (Norm): The one after the rectifier.
        injection (Tensor, optional): (N, C, H, W).
        mask (Tensor, optional): (N, C, 1, 1), a dropout mask; it gets no gradient.
        smooth (bool): Rectify by softplus instead of ReLU.
        kernel (str): One of :data:`~mdeq_mm.kernels.KERNELS`.
    """
    parameters = (norm2.weight, norm2.bias, norm3.weight, norm3.bias)
    kernel = backends.chosen(kernel, x, z, injection, mask, *parameters)
    # A float32 state added to maps of lower precision would promote everything after it to float32.
    z = backends.as_map(z, x, kernel)
    if injection is not None:
        injection = backends.as_map(injection, x, kernel)
    if mask is not None:
        mask = mask.to(x.dtype)
    if kernel == 'native':
        return _native(x, z, norm2, norm3, injection, mask, smooth)
    x = backends.as_map(x, x, kernel)
    options = (norm2.groups, norm3.groups, norm2.eps, norm3.eps, smooth)
    return _ResidualNorms.apply(kernel, options, x, z, injection, mask, *parameters)


def _native(x, z, norm2, norm3, injection, mask, smooth):
    out = x if mask is None else x * mask
    out = out if injection is None else out + injection
    return native_norm(native_rectify(native_norm(out, norm2) + z, smooth), norm3)


class _ResidualNorms(torch.autograd.Function):
    """Keeps its inputs and the moments; the rectified and normalized maps are recomputed."""

    @staticmethod
    def forward(ctx, kernel, options, x, z, injection, mask, weight2, bias2, weight3, bias3):
        inputs = (x, z, injection, mask, weight2, bias2, weight3, bias3)
        y, stats2, stats3 = backends.operations(kernel).residual_norms(*inputs, *options)
        ctx.save_for_backward(*inputs, stats2, stats3)
        ctx.kernel, ctx.options = kernel, options
        return y

    @staticmethod
    def backward(ctx, grad):
        *inputs, stats2, stats3 = ctx.saved_tensors
        groups2, groups3, eps2, eps3, smooth = ctx.options
        needs = ctx.needs_input_grad[2:]
        if backends.differentiates():

            def native(x, z, injection, mask, weight2, bias2, weight3, bias3):
                norm2 = Norm(groups2, weight2, bias2, eps2)
                norm3 = Norm(groups3, weight3, bias3, eps3)
                return _native(x, z, norm2, norm3, injection, mask, smooth)

            return None, None, *native_gradients(native, inputs, needs, grad)
        ops = backends.operations(ctx.kernel)
        wanted = needs[2], needs[4] or needs[5], needs[6] or needs[7]
        dx, dz, separate, parameters2, parameters3 = ops.residual_norms_backward(
            grad, *inputs, stats2, stats3, groups2, groups3, smooth, *wanted
        )
        # Without a mask between them, x and the injection have the same gradient.
        injection, mask = inputs[2:4]
        dinjection = None
        if needs[2]:
            dinjection = dx if injection is None or mask is None else separate
        affine = (*parameters2, *parameters3) if any(needs[4:]) else (None,) * 4
        affine = [
            g.to(p.dtype) if need else None for g, p, need in zip(affine, inputs[4:], needs[4:])
        ]
        return None, None, dx, dz, dinjection, None, *affine
