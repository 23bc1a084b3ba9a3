"""The fusion of the scales before its last convolution (paper, §3.2): rectify(sum of maps)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .formulas import rectify_gradient_of
from .norms import Norm, native_gradients, native_norm, native_rectify


class Term(NamedTuple):
    """A map (N, C, h, w) to be added, after ``norm`` if there is one.

    With ``upsample`` it may have any size and is upsampled to the nearest neighbour as it is read.
    """

    x: Tensor
    norm: Norm | None = None
    upsample: bool = False


def sum_rectify(
    own: Tensor, terms: Sequence[Term], smooth: bool = False, kernel: str = 'auto'
) -> Tensor:
    """``rectify(own + sum of upsampled(norm(term)))`` in the dtype of ``own``.

    Args:
        own (Tensor): (N, C, H, W).
        terms (Sequence[Term]): What is added.
        smooth (bool): Rectify by softplus instead of ReLU.
        kernel (str): One of :data:`~mdeq_mm.kernels.KERNELS`.
    """
    norms = [Norm(0) if term.norm is None else term.norm for term in terms]
    weights = [norm.weight for norm in norms]
    biases = [norm.bias for norm in norms]
    kernel = backends.chosen(kernel, own, *(term.x for term in terms), *weights, *biases)
    given = [backends.as_map(term.x, own, kernel) for term in terms]
    if kernel == 'native':
        return _native(own, given, norms, [term.upsample for term in terms], smooth)
    for x, term in zip(given, terms):
        if not term.upsample and x.shape != own.shape:
            raise ValueError(
                f'sum_rectify: a term of {tuple(x.shape)} cannot be added to a map of '
                f'{tuple(own.shape)} unless it is upsampled.'
            )
    own = backends.as_map(own, own, kernel)
    groups, eps = [norm.groups for norm in norms], [norm.eps for norm in norms]
    return _SumRectify.apply(kernel, groups, eps, smooth, own, *given, *weights, *biases)


def _native(own, given, norms, upsamples, smooth):
    # The first sum makes a new tensor, so the following operations may be in place.
    total = None
    for x, norm, upsample in zip(given, norms, upsamples):
        x = _native_term(x, norm, own.shape[2:] if upsample else None)
        total = own + x if total is None else total.add_(x)
    return native_rectify(own.clone() if total is None else total, smooth)


def _native_term(x: Tensor, norm: Norm, size: Sequence[int] | None) -> Tensor:
    x = native_norm(x, norm) if norm.groups else x
    # Sizes are not compared: an exported graph would then hold only for sizes that compare alike.
    return x if size is None else F.interpolate(x, size=size, mode='nearest')


class _SumRectify(torch.autograd.Function):
    """Keeps the result, which gives the rectifier's slope, the normed terms, and moments."""

    @staticmethod
    def forward(ctx, kernel, groups, eps, smooth, own, *tensors):
        terms, weights, biases = _thirds(tensors)
        ops = backends.operations(kernel)
        y, stats = ops.sum_rectify(own, terms, weights, biases, groups, eps, smooth)
        # A plain term of the sum's size need not be kept: its gradient is that of own.
        moved = [count > 0 or x.shape[2:] != y.shape[2:] for count, x in zip(groups, terms)]
        kept = [x if m else None for x, m in zip(terms, moved)]
        ctx.save_for_backward(y, stats, *kept, *weights, *biases)
        ctx.options = kernel, groups, eps, smooth
        return y

    @staticmethod
    def backward(ctx, grad):
        y, stats, *tensors = ctx.saved_tensors
        kernel, groups, eps, smooth = ctx.options
        needs = _thirds(ctx.needs_input_grad[5:])
        terms, weights, biases = _thirds(tensors)
        if backends.differentiates():
            down = rectify_gradient_of(grad, y, smooth)
            norms = [Norm(*values) for values in zip(groups, weights, biases, eps)]
            grads = [
                (down, None, None) if x is None else _term_gradients(x, norm, need, down)
                for x, norm, need in zip(terms, norms, zip(*needs))
            ]
            affine = [g for _, g, _ in grads] + [g for _, _, g in grads]
            return None, None, None, None, down, *(g for g, _, _ in grads), *affine
        wanted = any(needs[1]) or any(needs[2])
        down, *others = backends.operations(kernel).sum_rectify_backward(
            grad,
            y,
            [y if x is None else x for x in terms],
            weights,
            biases,
            stats,
            groups,
            smooth,
            wanted,
        )
        others = iter(others)
        grads = [down if x is None else next(others) for x in terms]
        pairs = [next(others) if wanted and count > 0 else (None, None) for count in groups]
        affine = [g for g, _ in pairs] + [g for _, g in pairs]
        affine = [
            g.to(p.dtype) if need else None
            for g, p, need in zip(affine, (*weights, *biases), (*needs[1], *needs[2]))
        ]
        return None, None, None, None, down, *grads, *affine


def _term_gradients(x: Tensor, norm: Norm, needs: Sequence[bool], down: Tensor) -> list:
    """Gradients of a term and its scale and shift that can be differentiated again."""
    size = None if x.shape == down.shape else down.shape[2:]

    def native(x, weight, bias):
        return _native_term(x, norm._replace(weight=weight, bias=bias), size)

    return native_gradients(native, (x, norm.weight, norm.bias), needs, down)


def _thirds(values: Sequence) -> tuple[list, list, list]:
    """Split a flat list into terms, weights and biases: an autograd function takes a flat list."""
    k = len(values) // 3
    return list(values[:k]), list(values[k : 2 * k]), list(values[2 * k :])
