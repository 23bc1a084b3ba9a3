"""Suite f: one evaluation of f and one vjp to its state, by fused operations and by torch's."""

import argparse
from typing import Any

from mdeq_mm.kernels import extension, resolve
from mdeq_mm.optim import has_bfloat16

import torch
from explicit import PAIRS
from nets import TINY, autocast, backbone
from timing import Result, Step, count_operations, interleaved, matmul_rate, timed
from torch.profiler import ProfilerActivity, profile

PRECISIONS = dict(float32=None, bf16=torch.bfloat16)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time both on one thread and on all of torch's threads, and how much of it is convolution."""
    fused = fused_kernel(args.device)
    threads = {1, torch.get_num_threads()} if args.device == 'cpu' else {torch.get_num_threads()}
    samples: dict[str, list[float]] = {}
    bounds: dict[str, dict[str, float]] = {}
    for count in sorted(threads):
        torch.set_num_threads(count)
        for precision in PRECISIONS:
            if precision == 'bf16' and not has_bfloat16(args.device):
                continue
            steps = candidates(args, precision, ('native', fused))
            where = f'{precision}, {count} thread{"s" * (count > 1)}'
            for name, values in interleaved(steps, args.repeats, args.device).items():
                samples[f'{where}, {name}'] = values
            if args.device == 'cpu':
                calls = [steps[f'{name}, {fused}'] for name in ('f', 'vjp')]
                bounds[where] = convolutions(calls, args.repeats, PRECISIONS[precision])
    caption = f'one evaluation of f and one vjp, {args.net}, batch {args.batch}'
    result = Result.of(samples, next(iter(samples)), caption)
    print(f'\n{result}')
    found = shares(result, fused)
    for where, bound in bounds.items():
        print(
            f'  {where}: convolutions are {bound["share"]:.2f} of f and vjp, at '
            f'{bound["rate"] / 1e9:.0f} GFLOP/s; a large matrix product has '
            f'{bound["matmul_rate"] / 1e9:.0f}'
        )
    return dict(result.to_dict(), fused=fused, fused_over_native=found, convolutions=bounds)


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
    if args.net in PAIRS:
        net_options, size = PAIRS[args.net].options, PAIRS[args.net].size or args.crop
    else:
        net_options, size = TINY, (32, 32)
    x = torch.randn(args.batch, 3, *size, device=args.device)
    steps: dict[str, Step] = {}
    for kernel in kernels:
        net = backbone(args.device, **net_options, norm_kernel=kernel).train()
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


def convolutions(calls: list[Step], repeats: int, dtype: torch.dtype | None) -> dict[str, float]:
    """What part of the time of some calls on a CPU is convolution, and how fast it is.

    Args:
        calls: The calls.
        repeats: How often they are repeated; the fastest repetition counts.
        dtype: Of the matrix product to compare with; None for float32.

    Returns:
        ``share`` of the time; ``rate`` of the convolutions and ``matmul_rate``, in floating-point
        operations a second.
    """

    def run() -> None:
        for call in calls:
            call()

    found = []
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            seconds = timed(run, 'cpu')
        inside = sum(
            event.self_cpu_time_total
            for event in profiled.key_averages()
            if 'convolution' in event.key
        )
        found.append((seconds, inside / 1e6))
    seconds, inside = min(found)
    rate = matmul_rate('cpu', dtype or torch.float32)
    return dict(share=inside / seconds, rate=count_operations(run) / inside, matmul_rate=rate)


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
