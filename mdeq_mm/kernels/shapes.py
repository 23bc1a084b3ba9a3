"""The results of the C++ operations for tensors without values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .norms import arithmetic


def _map(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _stats(x: Tensor, groups: int) -> Tensor:
    return x.new_empty((2, x.shape[0], groups), dtype=arithmetic(x))


def _parameters(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty((2, x.shape[1] if wanted else 0), dtype=arithmetic(x))


def _norm_relu(x, weight, bias, groups, eps, relu):
    return _map(x), _stats(x, groups)


def _norm_relu_(x, weight, bias, groups, eps, relu):
    return None


def _norm_relu_backward(grad, x, stats, weight, bias, groups, relu, affine):
    return _map(x), _parameters(x, affine)


def _residual_norms(
    x, z, injection, mask, weight2, bias2, weight3, bias3, groups2, groups3, eps2, eps3, smooth
):
    return _map(x), _stats(x, groups2), _stats(x, groups3)


def _residual_norms_backward(
    grad,
    x,
    z,
    injection,
    mask,
    weight2,
    bias2,
    weight3,
    bias3,
    stats2,
    stats3,
    groups2,
    groups3,
    smooth,
    inject,
    affine2,
    affine3,
):
    separate = inject and injection is not None and mask is not None
    injected = _map(x) if separate else x.new_empty((0,))
    return _map(x), _map(x), injected, _parameters(x, affine2), _parameters(x, affine3)


def _sum_rectify(own, terms, weights, biases, groups, eps, smooth):
    return _map(own), _stats(own, sum(groups))


def _sum_rectify_backward(
    grad, y, terms: Sequence[Tensor], weights, biases, stats, groups, smooth, affine
):
    moved = [_map(x) for x, g in zip(terms, groups) if g > 0 or x.shape[2:] != y.shape[2:]]
    affines = [_parameters(y, True) for g in groups if g > 0 and affine]
    return [_map(y), *moved, *affines]


#: Name of an operation -> what it returns.
ALL = dict(
    norm_relu=_norm_relu,
    norm_relu_=_norm_relu_,
    norm_relu_backward=_norm_relu_backward,
    residual_norms=_residual_norms,
    residual_norms_backward=_residual_norms_backward,
    sum_rectify=_sum_rectify,
    sum_rectify_backward=_sum_rectify_backward,
)
