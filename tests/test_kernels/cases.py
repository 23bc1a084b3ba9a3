"""The operations on random inputs, and what they are by definition, in plain arithmetic."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mdeq_mm.kernels import Norm, Term, norm_relu, norm_relu_conv, residual_norms, sum_rectify

LAST = torch.channels_last


def maps(n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A map with a mean and, per channel, a scale of its own."""
    x = torch.randn(n, c, h, w, dtype=torch.float64) * (0.5 + torch.rand(c, 1, 1)) + 0.7
    return x.to(dtype).contiguous(memory_format=LAST)


def norm(c: int, groups: int, affine: bool = True, dtype: torch.dtype = torch.float64) -> Norm:
    """A group norm with scales near one and shifts near zero."""
    if not affine:
        return Norm(groups)
    return Norm(groups, 0.5 + torch.rand(c, dtype=dtype), 0.3 * torch.randn(c, dtype=dtype))


def defined_norm(x: Tensor, norm: Norm) -> Tensor:
    """(x - mean) / sqrt(variance + eps) of each group, times scale, plus shift."""
    n, c, h, w = x.shape
    g = x.reshape(n, norm.groups, c // norm.groups * h * w)
    g = g - g.mean(2, keepdim=True)
    variance = g.square().mean(2, keepdim=True)
    y = (g / (variance + norm.eps).sqrt()).reshape(n, c, h, w)
    return y if norm.weight is None else y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def rectified(x: Tensor, smooth: bool) -> Tensor:
    return F.softplus(x) if smooth else F.relu(x)


@dataclass
class NormRelu:
    """relu(norm(x))."""

    x: Tensor
    norm: Norm
    relu: bool = True

    @classmethod
    def random(cls, n, c, h, w, groups, affine=True, dtype=torch.float64, relu=True):
        return cls(maps(n, c, h, w, dtype), norm(c, groups, affine, _wide(dtype)), relu)

    def computed(self, kernel, **options):
        return norm_relu(self.x, self.norm, self.relu, kernel, **options)

    def defined(self):
        y = defined_norm(self.x, self.norm)
        return F.relu(y) if self.relu else y


@dataclass
class NormReluConv:
    """conv(relu(norm(x)))."""

    x: Tensor
    norm: Norm
    weight: Tensor

    @classmethod
    def random(cls, n, c, h, w, groups, affine=True, dtype=torch.float64):
        weight = torch.randn(c, c, 3, 3, dtype=torch.float64).to(dtype)
        return cls(maps(n, c, h, w, dtype), norm(c, groups, affine, _wide(dtype)), weight)

    def computed(self, kernel):
        return norm_relu_conv(self.x, self.norm, self.weight, 1, kernel)

    def defined(self):
        return F.conv2d(F.relu(defined_norm(self.x, self.norm)), self.weight, padding=1)


@dataclass
class Residual:
    """norm3(rectify(norm2(x * mask + injection) + z))."""

    x: Tensor
    z: Tensor
    norm2: Norm
    norm3: Norm
    injection: Tensor | None
    mask: Tensor | None
    smooth: bool = False

    @classmethod
    def random(
        cls,
        n,
        c,
        h,
        w,
        groups,
        affine=True,
        dtype=torch.float64,
        injected=True,
        dropped=True,
        smooth=False,
    ):
        x, z = maps(n, c, h, w, dtype), maps(n, c, h, w, dtype)
        norm2, norm3 = norm(c, groups, affine, _wide(dtype)), norm(c, 1, affine, _wide(dtype))
        injection = maps(n, c, h, w, dtype) if injected else None
        # Powers of two, which every dtype can hold.
        mask = 2.0 * (torch.rand(n, c, 1, 1) > 0.3).to(dtype) if dropped else None
        return cls(x, z, norm2, norm3, injection, mask, smooth)

    def computed(self, kernel):
        return residual_norms(
            self.x, self.z, self.norm2, self.norm3, self.injection, self.mask, self.smooth, kernel
        )

    def defined(self):
        u = self.x if self.mask is None else self.x * self.mask
        u = u if self.injection is None else u + self.injection
        t = rectified(defined_norm(u, self.norm2) + self.z, self.smooth)
        return defined_norm(t, self.norm3)


@dataclass
class Sum:
    """rectify(own + terms), of which one is plain and has the size of own."""

    own: Tensor
    plain: Tensor
    same: Term
    small: Term
    smallest: Term
    smooth: bool = False

    @classmethod
    def random(cls, n, c, h, w, groups, affine=True, dtype=torch.float64, smooth=False):
        half, quarter = ((h + 1) // 2, (w + 1) // 2), ((h + 3) // 4, (w + 3) // 4)
        norms = [norm(c, groups, affine, _wide(dtype)) for _ in range(2)]
        return cls(
            maps(n, c, h, w, dtype),
            maps(n, c, h, w, dtype),
            Term(maps(n, c, h, w, dtype), norms[0]),
            Term(maps(n, c, *half, dtype), norms[1], True),
            Term(maps(n, c, *quarter, dtype), None, True),
            smooth,
        )

    @property
    def terms(self):
        return [Term(self.plain), self.same, self.small, self.smallest]

    def computed(self, kernel):
        return sum_rectify(self.own, self.terms, self.smooth, kernel)

    def defined(self):
        total = self.own
        for x, norm, _ in self.terms:
            x = x if norm is None else defined_norm(x, norm)
            total = total + F.interpolate(x, size=self.own.shape[2:], mode='nearest')
        return rectified(total, self.smooth)


Case = NormRelu | NormReluConv | Residual | Sum


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Scales stay in float32 beside maps in bfloat16."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def mapped(case: Case, change) -> Case:
    """The case with ``change`` applied to each of its tensors."""

    def apply(value):
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, (Norm, Term)):
            return type(value)(*map(apply, value))
        return value

    return replace(case, **{name: apply(value) for name, value in vars(case).items()})


def tensors(case: Case) -> list[Tensor]:
    """All tensors of the case, in order, except the mask, which gets no gradient."""
    found = []
    mapped(case, lambda t: found.append(t) or t)
    return [t for t in found if t is not getattr(case, 'mask', None)]


def differentiable(case: Case) -> Case:
    """The same values, as leaves that require grad."""
    mask = getattr(case, 'mask', None)
    return mapped(case, lambda t: t if t is mask else t.detach().clone().requires_grad_())


def results(case: Case, compute, weights: Tensor) -> list[Tensor]:
    """The result of ``compute(case)`` and the gradients of its product with ``weights``."""
    case = differentiable(case)
    y = compute(case)
    grads = torch.autograd.grad(y, tensors(case), weights.to(y.dtype))
    return [y.detach(), *grads]
