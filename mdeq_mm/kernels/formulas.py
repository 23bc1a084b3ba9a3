"""What each operation computes, as formulas over (N, HW, C), used by ``kernel='compiled'``.

The functions at the end have the names, arguments and results of the operations in C++. A map is
*rows* here: (N, HW, C) in the dtype of arithmetic, at least float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .norms import arithmetic


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, HW, C), a view where the dtype stays."""
    return x.flatten(2).transpose(1, 2).to(arithmetic(x))


def maps(y: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`rows`, in the shape and dtype of ``like``."""
    return y.transpose(1, 2).unflatten(2, like.shape[2:]).to(like.dtype)


def wide(stat: Tensor, channels: int) -> Tensor:
    """A value per group -> per channel: (N, G) -> (N, 1, C)."""
    return stat.repeat_interleave(channels // stat.shape[1], dim=1).unsqueeze(1)


def moments(x: Tensor, groups: int, eps: float) -> Tensor:
    """Rows -> (2, N, G): mean and 1 / sqrt(variance + eps).

    The variance of a group is the mean of its channels' variances plus the variance of their
    means: no difference of large numbers.
    """
    variances, means = (v.unflatten(1, (groups, -1)) for v in torch.var_mean(x, 1, correction=0))
    mean = means.mean(2)
    variance = variances.mean(2) + (means - mean.unsqueeze(2)).square().mean(2)
    return torch.stack([mean, (variance + eps).rsqrt()])


def centered(x: Tensor, stats: Tensor) -> Tensor:
    """Rows minus the means of their groups."""
    return x - wide(stats[0], x.shape[2])


def affine(x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Centered rows times 1 / deviation and scale, plus shift."""
    out = x * wide(stats[1], x.shape[2])
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def norm_gradient(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`affine` of :func:`centered` rows.

    Args:
        grad (Tensor): (N, HW, C) of the result.
        x (Tensor): (N, HW, C) centered rows.
        stats (Tensor): (2, N, G) of :func:`moments`.
        weight (Tensor, optional): (C,).

    Returns:
        tuple: Gradients of the rows before they were centered, (N, HW, C), and of scale and shift,
        (2, C).
    """
    channels, groups = x.shape[2], stats.shape[2]
    rstd = stats[1]
    grads, products = grad.sum(1), (grad * x).sum(1)
    parameters = torch.stack([(products * wide(rstd, channels)[:, 0]).sum(0), grads.sum(0)])
    count = x.shape[1] * (channels // groups)
    if weight is not None:
        grad, grads, products = grad * weight, grads * weight, products * weight
    a, b = (s.unflatten(1, (groups, -1)).sum(2) / count for s in (grads, products))
    dx = grad * wide(rstd, channels) - wide(rstd * a, channels) - x * wide(rstd**3 * b, channels)
    return dx, parameters


def rectify(x: Tensor, smooth: bool) -> Tensor:
    """Softplus or ReLU."""
    return F.softplus(x) if smooth else F.relu(x)


def rectify_gradient(grad: Tensor, x: Tensor, smooth: bool) -> Tensor:
    """The gradient of :func:`rectify` at ``x``."""
    return grad * torch.where(x > 20, 1, x.sigmoid()) if smooth else torch.where(x <= 0, 0, grad)


def rectify_gradient_of(grad: Tensor, result: Tensor, smooth: bool) -> Tensor:
    """The same, from the result of :func:`rectify`."""
    if not smooth:
        return torch.where(result <= 0, 0, grad)
    return grad * torch.where(result > 20, 1, -torch.expm1(-result))


def norm_relu(x, weight, bias, groups, eps, relu):
    """relu(norm(x)), and the moments (2, N, G)."""
    values = rows(x)
    stats = moments(values, groups, eps)
    y = affine(centered(values, stats), stats, weight, bias)
    return maps(rectify(y, False) if relu else y, x), stats


def norm_relu_backward(grad, x, stats, weight, bias, groups, relu, wanted):
    """Gradients of x, and of scale and shift, (2, C) or (2, 0) if not ``wanted``."""
    values, g = centered(rows(x), stats), rows(grad)
    if relu:
        g = rectify_gradient(g, affine(values, stats, weight, bias), False)
    dx, parameters = norm_gradient(g, values, stats, weight)
    return maps(dx, x), parameters if wanted else parameters[:, :0]


def residual_norms(
    x, z, injection, mask, weight2, bias2, weight3, bias3, groups2, groups3, eps2, eps3, smooth
):
    """norm3(rectify(norm2(x * mask + injection) + z)), and the moments of both norms."""
    total = _residual_sum(x, injection, mask)
    stats2 = moments(total, groups2, eps2)
    inner = affine(centered(total, stats2), stats2, weight2, bias2) + rows(z)
    inner = rectify(inner, smooth)
    stats3 = moments(inner, groups3, eps3)
    return maps(affine(centered(inner, stats3), stats3, weight3, bias3), x), stats2, stats3


def _residual_sum(x, injection, mask):
    total = rows(x) if mask is None else rows(x) * rows(mask)
    return total if injection is None else total + rows(injection)


def residual_norms_backward(
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
    wanted2,
    wanted3,
):
    """Gradients of x, z, the injection (empty where it is that of x), scales and shifts."""
    total = centered(_residual_sum(x, injection, mask), stats2)
    inner = affine(total, stats2, weight2, bias2) + rows(z)
    outer = centered(rectify(inner, smooth), stats3)
    dinner, parameters3 = norm_gradient(rows(grad), outer, stats3, weight3)
    dz = rectify_gradient(dinner, inner, smooth)
    dtotal, parameters2 = norm_gradient(dz, total, stats2, weight2)
    dx = dtotal if mask is None else dtotal * rows(mask)
    separate = inject and injection is not None and mask is not None
    return (
        maps(dx, x),
        maps(dz, x),
        maps(dtotal, x) if separate else x.new_empty(0),
        parameters2 if wanted2 else parameters2[:, :0],
        parameters3 if wanted3 else parameters3[:, :0],
    )


def sum_rectify(own, terms, weights, biases, groups, eps, smooth):
    """rectify(own + sum of terms), and the moments of terms with a norm, (2, sum of N * groups)."""
    total, all_stats = rows(own), []
    for x, weight, bias, count, e in zip(terms, weights, biases, groups, eps):
        values = rows(x)
        if count:
            stats = moments(values, count, e)
            all_stats.append(stats.flatten(1))
            values = affine(centered(values, stats), stats, weight, bias)
        if x.shape[2:] != own.shape[2:]:
            values = rows(F.interpolate(_wide_map(values, x), size=own.shape[2:], mode='nearest'))
        total = total + values
    stats = torch.cat(all_stats, 1) if all_stats else total.new_empty(2, 0)
    return maps(rectify(total, smooth), own), stats


def _wide_map(values: Tensor, like: Tensor) -> Tensor:
    """(N, hw, C) -> (N, C, h, w), in the dtype of arithmetic."""
    return values.transpose(1, 2).unflatten(2, like.shape[2:])


def sum_rectify_backward(grad, y, terms, weights, biases, stats, groups, smooth, wanted):
    """Gradients of own, of terms with a norm or another size, and (2, C) of scales and shifts."""
    down = rectify_gradient_of(rows(grad), rows(y), smooth)
    out, affines, start = [maps(down, y)], [], 0
    for x, weight, count in zip(terms, weights, groups):
        own = down
        if x.shape[2:] != y.shape[2:]:
            own = torch.ops.aten.upsample_nearest2d_backward(
                _wide_map(down, y), y.shape[2:], x.shape
            )
            own = rows(own)
        elif not count:
            continue
        if count:
            part = stats[:, start : start + len(x) * count].unflatten(1, (len(x), count))
            start += len(x) * count
            own, parameters = norm_gradient(own, centered(rows(x), part), part, weight)
            affines += [parameters] if wanted else []
        out.append(maps(own, x))
    return [*out, *affines]
