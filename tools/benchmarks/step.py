"""Suite step: a training step, other implementations of it, and other networks."""

import argparse
from typing import Any

from mdeq_mm.optim import has_bfloat16

import explicit
import torch
from nets import TINY, Torchdeq, backbone, calls_alone, resnet101, train_step
from timing import Result, Step, count_operations, interleaved, matmul_rate


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time a step of the network, of what else does the same, and its lower bound."""
    if args.net in explicit.PAIRS:
        return explicit.measure(args)
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    steps = candidates(args, x)
    samples = interleaved(steps, args.repeats, args.device)
    base = 'torchdeq broyden' if 'torchdeq broyden' in samples else 'mdeq_mm Broyden'
    caption = f'training step, batch {args.batch}, {args.nfe}+{args.nfe} NFE'
    result = Result.of(samples, base, caption)
    print(f'\n{result}')
    operations = count_operations(steps['mdeq_mm Broyden'])
    return dict(result.to_dict(), **limits(result, operations, args.device))


def candidates(args: argparse.Namespace, x: torch.Tensor) -> dict[str, Step]:
    """The steps to time, by name."""
    device, nfe, bf16 = args.device, args.nfe, torch.bfloat16
    net = backbone(device, nfe, **TINY)

    def step(dtype: torch.dtype | None = None, **options: Any) -> Step:
        return train_step(backbone(device, nfe, **TINY, **options), x, dtype)

    steps: dict[str, Step] = {
        'mdeq_mm Broyden': step(),
        'mdeq_mm Anderson': step(solver='Anderson'),
        'mdeq_mm plain': step(solver='FixedPointIteration'),
        'mdeq_mm Broyden + phantom': step(gradient=dict(type='PhantomGradient')),
        'mdeq_mm Broyden + Jacobian-free': step(gradient=dict(type='JacobianFreeGradient')),
        f'{nfe} unrolled layers': step(unrolled_layers=nfe),
        'calls alone': calls_alone(net, x, nfe, None),
        'ResNet-101 (mmpretrain)': train_step(resnet101(device), x),
    }
    if has_bfloat16(device):
        steps['mdeq_mm Broyden, bf16'] = step(bf16)
        steps['calls alone, bf16'] = calls_alone(net, x, nfe, bf16)
    else:
        print('  this CPU has no instructions for bfloat16: left out')
    try:
        for name in ('broyden', 'anderson', 'fixed_point_iter'):
            steps[f'torchdeq {name}'] = torchdeq_step(device, x, nfe, name, 'native')
        fused = torchdeq_step(device, x, nfe, 'broyden', 'auto')
        steps['torchdeq broyden, fused f'] = fused
    except ImportError:
        print('  torchdeq is not installed (pip install torchdeq): left out')
    return steps


def torchdeq_step(device: str, x: torch.Tensor, nfe: int, solver: str, norm_kernel: str) -> Step:
    """A step with torchdeq's solvers, whose users have an f of torch's operators, ``'native'``."""
    net = backbone(device, **TINY, norm_kernel=norm_kernel)
    return train_step(Torchdeq(net, nfe, solver, ift=True), x)


def limits(result: Result, operations: int, device: str) -> dict[str, Any]:
    """How far a step, and its evaluations alone, are from the speed of a large matrix product."""
    found = {}
    for name, dtype in (('float32', torch.float32), ('bfloat16', torch.bfloat16)):
        if dtype == torch.bfloat16 and not has_bfloat16(device):
            continue
        rate = matmul_rate(device, dtype)
        found[f'limit_{name}'] = dict(operations=operations, rate=rate, seconds=operations / rate)
        suffix = ', bf16' if name == 'bfloat16' else ''
        ratio, alone = (
            result.minimum[case + suffix] * rate / operations
            for case in ('mdeq_mm Broyden', 'calls alone')
        )
        print(
            f'  {name}: {operations / 1e9:.0f} GFLOP a step, matmul {rate / 1e9:.0f} GFLOP/s; the '
            f'step takes {ratio:.2f} times this limit, its calls alone {alone:.2f}'
        )
    return found
