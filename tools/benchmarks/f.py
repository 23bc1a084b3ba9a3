"""Suite f: one evaluation of f and one vjp to its state, by fused operations and by torch's."""

import argparse
from typing import Any

from mdeq_mm.kernels import extension, resolve
from mdeq_mm.optim import has_bfloat16

import torch
from nets import TINY, autocast, backbone
from timing import Result, Step, interleaved

PRECISIONS = dict(float32=None, bf16=torch.bfloat16)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time both on the tiny network, on one thread and on all of torch's threads."""
    fused = fused_kernel(args.device)
    threads = {1, torch.get_num_threads()} if args.device == 'cpu' else {torch.get_num_threads()}
    samples: dict[str, list[float]] = {}
    for count in sorted(threads):
        torch.set_num_threads(count)
        for precision in PRECISIONS:
            if precision == 'bf16' and not has_bfloat16(args.device):
                continue
            steps = candidates(args, precision, ('native', fused))
            where = f'{precision}, {count} thread{"s" * (count > 1)}'
            for name, values in interleaved(steps, args.repeats, args.device).items():
                samples[f'{where}, {name}'] = values
    caption = f'one evaluation of f and one vjp, batch {args.batch}'
    result = Result.of(samples, next(iter(samples)), caption)
    print(f'\n{result}')
    return dict(result.to_dict(), fused=fused, fused_over_native=shares(result, fused))


def fused_kernel(device: str) -> str:
    """The kernel to compare with torch's operators.

    Raises:
        RuntimeError: If a CPU has no C++ operations.
    """
    if device != 'cpu':
        return 'compiled'
    if resolve('cpp', device) != 'cpp':
        raise RuntimeError(
            f'suite f needs the C++ operations, which are missing: {extension.load()}'
        )
    return 'cpp'


def candidates(
    args: argparse.Namespace, precision: str, kernels: tuple[str, ...]
) -> dict[str, Step]:
    """f and vjp of each kernel, by name."""
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    steps: dict[str, Step] = {}
    for kernel in kernels:
        net = backbone(args.device, **TINY, norm_kernel=kernel).train()
        cast = autocast(x.device, PRECISIONS[precision])
        with torch.no_grad(), cast:
            problem = net.problem(x)
            z = problem(problem.start)
        state = z.clone().requires_grad_()
        with cast:
            out = problem(state)
        v = torch.randn_like(out)

        def f(problem=problem, z=z, cast=cast) -> None:
            with torch.no_grad(), cast:
                problem(z)

        def vjp(out=out, state=state, v=v) -> None:
            torch.autograd.grad(out, state, v, retain_graph=True)

        steps[f'f, {kernel}'], steps[f'vjp, {kernel}'] = f, vjp
    return steps


def shares(result: Result, fused: str) -> dict[str, float]:
    """Time by the fused operations over time by torch's, of f, of the vjp and of both."""
    found = {}
    for name, seconds in result.minimum.items():
        if not name.endswith(', native'):
            continue
        where, what = name.removesuffix(', native').rsplit(', ', 1)
        found[f'{where}, {what}'] = result.minimum[f'{where}, {what}, {fused}'] / seconds
        if what == 'vjp':
            of = [
                sum(result.minimum[f'{where}, {part}, {kernel}'] for part in ('f', 'vjp'))
                for kernel in (fused, 'native')
            ]
            found[f'{where}, f and vjp'] = of[0] / of[1]
    for name, share in found.items():
        print(f'  {fused} over native, {name}: {share:.3f}')
    return found
