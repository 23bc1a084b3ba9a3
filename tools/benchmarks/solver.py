"""Suite solver: time of a solve over the time of its evaluations of f."""

import argparse
from typing import Any

from mdeq_mm.deq import Anderson, FixedPointIteration, LimitedMemoryBroyden, solve

import torch
from nets import TINY, backbone, repeat
from timing import Result, Step, interleaved


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every solver on the f of the tiny network, and f alone."""
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    limits = dict(max_iter=args.nfe, tol=0.0)
    solvers = {
        'FixedPointIteration': FixedPointIteration(**limits),
        'Anderson, memory 5': Anderson(memory=5, **limits),
        'Anderson, memory 10': Anderson(memory=10, **limits),
        'LimitedMemoryBroyden, memory 5': LimitedMemoryBroyden(memory=5, **limits),
        'LimitedMemoryBroyden, memory 10': LimitedMemoryBroyden(memory=10, **limits),
        'LimitedMemoryBroyden, memory 10, bfloat16 history': LimitedMemoryBroyden(
            memory=10, history_dtype='bfloat16', **limits
        ),
    }
    with torch.no_grad():
        f = backbone(args.device, **TINY).problem(x)
        steps: dict[str, Step] = {'f alone': lambda: repeat(f, args.nfe)}
        for name, solver in solvers.items():
            steps[name] = lambda solver=solver: solve(f, f.start, solver)
        samples = interleaved(steps, args.repeats, args.device)
    caption = f'time over {args.nfe} evaluations of f'
    result = Result.of(samples, base='f alone', caption=caption)
    print(f'\n{result}')
    return result.to_dict()
