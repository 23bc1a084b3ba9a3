"""The networks that the suites measure, and a training step for any of them."""

from pathlib import Path
from typing import Any

from mdeq_mm.deq import Problem
from mdeq_mm.models import MDEQBackbone

import torch
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from timing import Step
from torch import Tensor, nn

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
TINY = dict(arch='tiny')
SMALL = dict(arch='small')
# The backbone of configs/mdeq_large_cifar10.py: the widths of the small one at full resolution.
LARGE = dict(arch='small', stem_strides=(1, 1))


def backbone(
    device: str,
    nfe: int | tuple[int, int] = 24,
    solver: str = 'LimitedMemoryBroyden',
    **options: Any,
) -> MDEQBackbone:
    """An MDEQ in training mode that spends exactly ``nfe`` evaluations of f in either pass.

    A pair gives the evaluations of the forward and of the backward pass.
    """
    forward, backward = both(nfe)
    parts = dict(type=solver, max_iter=forward, tol=0.0)
    adjoint = dict(parts, max_iter=backward)
    options.setdefault('gradient', dict(type='ImplicitGradient', solver=adjoint))
    torch.manual_seed(0)
    return MDEQBackbone(solver=parts, **options).to(device)


def both(nfe: int | tuple[int, int]) -> tuple[int, int]:
    """Evaluations in the forward and in the backward pass."""
    return (nfe, nfe) if isinstance(nfe, int) else nfe


class Torchdeq(nn.Module):
    """The same stem and f with torchdeq's solvers instead of ours.

    Args:
        net: The network whose stem and f are used.
        nfe: Evaluations in either pass, or in the forward and in the backward one.
        solver: Name of the solver in torchdeq.

    Raises:
        ImportError: If torchdeq is not installed.
    """

    def __init__(
        self, net: MDEQBackbone, nfe: int | tuple[int, int], solver: str, **options: Any
    ) -> None:
        super().__init__()
        from torchdeq import get_deq

        self.net = net
        forward, backward = both(nfe)
        limits = dict(f_max_iter=forward, b_max_iter=backward, f_tol=0.0, b_tol=0.0)
        self.deq = get_deq(f_solver=solver, b_solver=solver, **limits, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) -> the maps of the equilibrium."""
        problem = self.net.problem(x)
        (z,) = self.deq(problem, problem.start)[0][-1:]
        return tuple(problem.maps(z))


def resnet101(device: str) -> nn.Module:
    """mmpretrain's ResNet-101 with the stem for CIFAR."""
    init_default_scope('mmpretrain')
    import mmpretrain.models  # noqa: F401

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(dict(type='ResNet_CIFAR', depth=101)).to(device)


def hrnet_w18(device: str) -> nn.Module:
    """mmsegmentation's HRNet-W18, as its configs for Cityscapes have it."""
    init_default_scope('mmseg')
    import mmseg.models  # noqa: F401

    widths = (18, 36, 72, 144)
    extra = dict(
        stage1=dict(
            num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(4,), num_channels=(64,)
        )
    )
    for branches, modules in ((2, 1), (3, 4), (4, 3)):
        extra[f'stage{branches}'] = dict(
            num_modules=modules,
            num_branches=branches,
            block='BASIC',
            num_blocks=(4,) * branches,
            num_channels=widths[:branches],
        )
    with DefaultScope.overwrite_default_scope('mmseg'):
        net = MODELS.build(dict(type='HRNet', norm_cfg=dict(type='BN'), extra=extra))
    return net.to(device)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to ``dtype``, or none."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def train_step(net: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Step:
    """Forward and backward pass of a network against random directions.

    Args:
        net: Returns one tensor or several.
        x: Its input.
        dtype: Of autocast; None for none.
    """
    net.train()
    generator = torch.Generator(x.device).manual_seed(0)
    directions: list[Tensor] = []

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with autocast(x.device, dtype):
            outs = net(x)
        outs = outs if isinstance(outs, (tuple, list)) else (outs,)
        if not directions:
            for out in outs:
                directions.append(torch.randn(out.shape, device=x.device, generator=generator))
        sum((out.float() * v).mean() for out, v in zip(outs, directions)).backward()

    return step


def calls_alone(net: MDEQBackbone, x: Tensor, nfe: int, dtype: torch.dtype | None) -> Step:
    """The necessary work of a training step: ``nfe`` evaluations of f and of its vjp.

    Plus the one evaluation of f with a graph and its backward pass. No solver can be faster.
    """
    net.train()

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with autocast(x.device, dtype):
            problem = net.problem(x)
            with torch.no_grad():
                z = repeat(problem, nfe)
            torch.clear_autocast_cache()
            out = problem(z.requires_grad_())
        v = torch.ones_like(out)
        for _ in range(nfe):
            (v,) = torch.autograd.grad(out, z, v, retain_graph=True)
        out.backward(v)

    return step


def repeat(f: Problem, count: int) -> Tensor:
    """f applied ``count`` times to its start, (N, D)."""
    z = f.start
    for _ in range(count):
        z = f(z)
    return z
