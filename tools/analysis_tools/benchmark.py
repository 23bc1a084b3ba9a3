"""Measure this project beside others on the same work, in one process.

    python tools/analysis_tools/benchmark.py --suite {solver,step,memory,scale}

solver: time of a solve over the time of its calls of f, for every solver.
step:   a training step (forward and backward) of the tiny CIFAR-10 network at the same number of
        evaluations, beside torchdeq's solvers on the same f, plain backpropagation through as many
        layers, mmpretrain's ResNet-101 with a CIFAR stem, and the same calls of f and vjp without
        a solver, which is as fast as any solver can be.
memory: peak memory of a step over what was there before it, at growing max_iter, and of
        mmsegmentation's HRNet-W18 on the same crop.
scale:  how the step grows with batch, resolution, width and evaluations, and on CPUs with a second
        process.

Repetitions are interleaved, so that a machine that changes speed does so for all candidates. The
result is medians and ratios, as a table, a JSON file and a picture in --out. torchdeq is optional.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import mdeq_mm
from mdeq_mm.deq.problem import pack, unpack
from mdeq_mm.deq.solvers import Anderson, FixedPointIteration, LimitedMemoryBroyden, solve
from mdeq_mm.layers import reset_masks
from mdeq_mm.models import MDEQBackbone

import mmcv
import mmengine
import torch
from matplotlib.figure import Figure
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import Tensor, nn
from torch.nn.utils import parametrize

TINY = dict(channels=(24, 24), stem_strides=(1, 1))
SMALL = dict(channels=(32, 64, 128, 256))
# Of suite scale.
PROCESSES = 2
Step = Callable[[], None]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--suite', required=True, choices=('solver', 'step', 'memory', 'scale'))
    parser.add_argument('--repeats', type=int, default=5, help='interleaved repetitions')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--nfe', type=int, default=24, help='evaluations of f in either pass')
    parser.add_argument('--crop', type=int, nargs=2, default=(512, 1024), help='of suite memory')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', default='work_dirs/benchmark', help='folder of JSON and picture')
    return parser.parse_args()


def environment(device: str) -> Dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name() if device == 'cuda' else platform.processor()
    return dict(
        device=device,
        name=name or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        mmengine=mmengine.__version__,
        mmcv=mmcv.__version__,
        mdeq_mm=mdeq_mm.__version__,
    )


def timed(step: Step, device: str) -> float:
    """Seconds of one call, on a GPU by its own events."""
    if device != 'cuda':
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(steps: Dict[str, Step], repeats: int, device: str) -> Dict[str, float]:
    """Median seconds of each candidate; every round runs all of them once."""
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        print(f'  warming up: {name}', flush=True)
        step()
    for round_ in range(repeats):
        print(f'  round {round_ + 1} of {repeats}', flush=True)
        for name, step in steps.items():
            times[name].append(timed(step, device))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Measured operations a second of a large matrix product."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    for _ in range(3):
        a @ a
    seconds = statistics.median(timed(lambda: a @ a, device) for _ in range(7))
    return 2 * 2048**3 / seconds


def backbone(device: str, nfe: int = 24, solver: str = 'LimitedMemoryBroyden', **options: Any):
    """An MDEQ in training mode that spends exactly ``nfe`` evaluations in either pass."""
    parts = dict(type=solver, max_iter=nfe, tol=0.0)
    if solver != 'FixedPointIteration':
        parts['memory'] = 10
    options.setdefault('gradient', dict(type='ImplicitGradient', solver=parts))
    torch.manual_seed(0)
    return MDEQBackbone(solver=parts, **options).to(device)


def precision(device: torch.device, dtype: Optional[torch.dtype]) -> torch.autocast:
    """Autocast to ``dtype``, or none."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def train_step(net: nn.Module, x: Tensor, autocast: Optional[torch.dtype] = None) -> Step:
    """Forward and backward of a network on random targets."""
    net.train()
    generator = torch.Generator(x.device).manual_seed(0)
    directions: List[Tensor] = []

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with precision(x.device, autocast):
            outs = net(x)
        outs = outs if isinstance(outs, (tuple, list)) else (outs,)
        if not directions:
            for out in outs:
                shape = dict(size=out.shape, device=out.device, generator=generator)
                directions.append(torch.randn(**shape))
        sum((out.float() * v).mean() for out, v in zip(outs, directions)).backward()

    return step


def flat_function(net: MDEQBackbone, x: Tensor):
    """f of a network for one image batch as a map of (N, D), and a start for it."""
    channels_last = x.device.type == 'cpu'
    layout = torch.channels_last if channels_last else torch.contiguous_format
    injection = net.injection(net.stem(x.contiguous(memory_format=layout)))
    shapes = net._shapes(injection)
    reset_masks(net)

    def f(z: Tensor) -> Tensor:
        return pack(net.cell(unpack(z, shapes, channels_last), injection), channels_last)

    size = sum(c * h * w for c, h, w in shapes)
    return f, torch.zeros(len(x), size, device=x.device)


def count_operations(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def suite_solver(args: argparse.Namespace) -> Dict[str, Any]:
    """Time of a solve over the time of its calls of f."""
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    net = backbone(args.device, **TINY)
    with torch.no_grad():
        f, z0 = flat_function(net, x)
    options = dict(max_iter=args.nfe, tol=0.0)
    low = dict(options, history_dtype='bfloat16')
    solvers = {
        'FixedPointIteration': FixedPointIteration(**options),
        'Anderson, memory 5': Anderson(memory=5, **options),
        'Anderson, memory 10': Anderson(memory=10, **options),
        'LimitedMemoryBroyden, memory 5': LimitedMemoryBroyden(memory=5, **options),
        'LimitedMemoryBroyden, memory 10': LimitedMemoryBroyden(memory=10, **options),
        'LimitedMemoryBroyden, memory 10, bfloat16 history': LimitedMemoryBroyden(memory=10, **low),
    }

    def calls() -> None:
        z = z0
        for _ in range(args.nfe):
            z = f(z)

    steps: Dict[str, Step] = {'f alone': calls}
    for name, solver in solvers.items():
        steps[name] = lambda solver=solver: solve(f, z0, solver)
    with torch.no_grad(), parametrize.cached():
        times = interleaved(steps, args.repeats, args.device)
    return rows(times, base='f alone', caption=f'time over {args.nfe} calls of f')


class _Torchdeq(nn.Module):
    """The same network with torchdeq's solvers in place of ours."""

    def __init__(self, net: MDEQBackbone, nfe: int, solver: str, **options: Any) -> None:
        super().__init__()
        from torchdeq import get_deq

        self.net = net
        limits = dict(f_max_iter=nfe, b_max_iter=nfe, f_tol=0.0, b_tol=0.0)
        self.deq = get_deq(f_solver=solver, b_solver=solver, **limits, **options)

    def forward(self, x: Tensor):
        injection = self.net.injection(self.net.stem(x))
        shapes = self.net._shapes(injection)
        reset_masks(self.net)

        def f(*z: Tensor):
            return self.net.cell(z, injection)

        with parametrize.cached():
            z0 = [torch.zeros(len(x), *shape, device=x.device) for shape in shapes]
            return self.deq(f, z0)[0][-1]


def _resnet101(device: str) -> nn.Module:
    init_default_scope('mmpretrain')
    import mmpretrain.models  # noqa: F401

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(dict(type='ResNet_CIFAR', depth=101)).to(device)


def calls_alone(net: MDEQBackbone, x: Tensor, nfe: int, autocast: Optional[torch.dtype]) -> Step:
    """What a training step cannot do without: its calls of f and vjp, and one backward pass."""
    net.train()

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with precision(x.device, autocast):
            f, z = flat_function(net, x)
            with torch.no_grad(), parametrize.cached():
                for _ in range(nfe):
                    z = f(z).float()
            torch.clear_autocast_cache()
            z.requires_grad_()
            out = f(z).float()
        g = torch.ones_like(out)
        for _ in range(nfe):
            (g,) = torch.autograd.grad(out, z, g, retain_graph=True)
        out.backward(g)

    return step


def suite_step(args: argparse.Namespace) -> Dict[str, Any]:
    """A training step beside other implementations of the same and of other work."""
    device, nfe = args.device, args.nfe
    x = torch.randn(args.batch, 3, 32, 32, device=device)
    net = backbone(device, nfe, **TINY)
    ours = train_step(net, x)
    steps: Dict[str, Step] = {
        'mdeq_mm Broyden': ours,
        'mdeq_mm Broyden, bf16': train_step(backbone(device, nfe, **TINY), x, torch.bfloat16),
        'mdeq_mm Anderson': train_step(backbone(device, nfe, 'Anderson', **TINY), x),
        'mdeq_mm plain': train_step(backbone(device, nfe, 'FixedPointIteration', **TINY), x),
        'mdeq_mm Broyden + phantom': train_step(
            backbone(device, nfe, gradient=dict(type='PhantomGradient'), **TINY), x
        ),
        'mdeq_mm Broyden + Jacobian-free': train_step(
            backbone(device, nfe, gradient=dict(type='JacobianFreeGradient'), **TINY), x
        ),
        f'{nfe} unrolled layers': train_step(backbone(device, unrolled_layers=nfe, **TINY), x),
        'calls alone': calls_alone(net, x, nfe, None),
        'calls alone, bf16': calls_alone(net, x, nfe, torch.bfloat16),
        'ResNet-101 (mmpretrain)': train_step(_resnet101(device), x),
    }
    try:
        for solver in ('broyden', 'anderson', 'fixed_point_iter'):
            module = _Torchdeq(backbone(device, **TINY), nfe, solver, ift=True)
            steps[f'torchdeq {solver}'] = train_step(module, x)
    except ImportError:
        print('  torchdeq is not installed (pip install torchdeq): left out')
    times = interleaved(steps, args.repeats, device)
    base = 'torchdeq broyden' if 'torchdeq broyden' in times else 'mdeq_mm Broyden'
    result = rows(times, base=base, caption=f'training step, batch {args.batch}, {nfe}+{nfe} NFE')
    operations = count_operations(ours)
    for name, dtype in (('float32', torch.float32), ('bfloat16', torch.bfloat16)):
        rate = matmul_rate(device, dtype)
        result[f'limit_{name}'] = dict(operations=operations, rate=rate, seconds=operations / rate)
        suffix = ', bf16' if name == 'bfloat16' else ''
        ratio, alone = (
            times[case + suffix] * rate / operations for case in ('mdeq_mm Broyden', 'calls alone')
        )
        print(
            f'  {name}: {operations / 1e9:.0f} GFLOP a step, matmul {rate / 1e9:.0f} GFLOP/s; the '
            f'step takes {ratio:.2f} times this limit, its calls alone {alone:.2f}'
        )
    return result


class PeakMemory:
    """Peak memory of a block over what was in use before it, in bytes."""

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0

    def _resident(self) -> int:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        return 4096 * pages

    def __enter__(self) -> 'PeakMemory':
        if self.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start, self.running = self._resident(), True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, self._resident() - self.start)
            time.sleep(0.002)

    def __exit__(self, *exc: Any) -> None:
        if self.device == 'cuda':
            self.peak = torch.cuda.max_memory_allocated() - self.start
        else:
            self.running = False
            self.thread.join()


def _peak_in_child(queue: Any, args: argparse.Namespace, name: str) -> None:
    """Peak of one training step in a fresh process, whose allocator holds nothing back."""
    x = torch.randn(1, 3, *args.crop, device=args.device)
    if name == 'HRNet-W18 (mmseg)':
        net = _hrnet().to(args.device)
    else:
        net = backbone(args.device, int(name.split()[-1]), **SMALL)
    step = train_step(net, x)
    with PeakMemory(args.device) as memory:
        step()
    queue.put(memory.peak)


def _hrnet() -> nn.Module:
    init_default_scope('mmseg')
    import mmseg.models  # noqa: F401

    stage = dict(num_modules=1, block='BASIC', num_blocks=(4, 4), num_channels=(18, 36))
    extra = dict(
        stage1=dict(
            num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(4,), num_channels=(64,)
        ),
        stage2=dict(num_branches=2, **stage),
        stage3=dict(
            num_branches=3,
            **{
                **stage,
                'num_modules': 4,
                'num_blocks': (4, 4, 4),
                'num_channels': (18, 36, 72),
            },
        ),
        stage4=dict(
            num_branches=4,
            **{
                **stage,
                'num_modules': 3,
                'num_blocks': (4, 4, 4, 4),
                'num_channels': (18, 36, 72, 144),
            },
        ),
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(dict(type='HRNet', norm_cfg=dict(type='BN'), extra=extra))


def suite_memory(args: argparse.Namespace) -> Dict[str, Any]:
    """Peak memory of one training step, each in a process of its own."""
    # glibc keeps freed blocks below a moving threshold; from a mapping of their own they go back
    # at once, so that what is resident is what is in use.
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'
    context = torch.multiprocessing.get_context('spawn')
    names = [f'MDEQ-small, max_iter {n}' for n in (6, 12, 20, 40)] + ['HRNet-W18 (mmseg)']
    peaks = {}
    for name in names:
        queue = context.Queue()
        child = context.Process(target=_peak_in_child, args=(queue, args, name))
        child.start()
        peaks[name] = queue.get() / 2**20
        child.join()
        print(f'  {name}: {peaks[name]:.0f} MB', flush=True)
    h, w = args.crop
    caption = f'peak memory of a step over start, MB, one {h}x{w} crop'
    return rows(peaks, base=names[1], caption=caption, unit='MB')


def suite_scale(args: argparse.Namespace) -> Dict[str, Any]:
    """How the training step of the tiny network grows."""
    device = args.device
    axes = dict(
        batch=[(n, dict(n=n)) for n in (4, 8, 16, 32)],
        resolution=[(s, dict(size=s)) for s in (16, 32, 48, 64)],
        width=[(c, dict(width=c)) for c in (8, 16, 24, 48)],
        nfe=[(k, dict(nfe=k)) for k in (6, 12, 18, 24)],
    )
    steps: Dict[str, Step] = {}
    for axis, points in axes.items():
        for value, change in points:
            case = {**dict(n=8, size=32, width=24, nfe=12), **change}
            channels = (case['width'],) * 2
            net = backbone(device, case['nfe'], **{**TINY, 'channels': channels})
            x = torch.randn(case['n'], 3, case['size'], case['size'], device=device)
            steps[f'{axis} {value}'] = train_step(net, x)
    times = interleaved(steps, args.repeats, device)
    result = rows(times, base='batch 8', caption='training step, each axis alone')
    return result if device == 'cuda' else dict(result, processes=processes(args.repeats))


def _time_process(rank: int, folder: str, repeats: int, nfe: int, batch: int) -> None:
    """Time a step of one process alone, and of both with a batch each or half of it each."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=PROCESSES
    )
    x = torch.randn(batch, 3, 32, 32)
    alone = train_step(backbone('cpu', nfe, **TINY), x)
    shared = torch.nn.parallel.DistributedDataParallel(backbone('cpu', nfe, **TINY))
    steps = {
        'alone': lambda: alone() if rank == 0 else None,
        'batch each': train_step(shared, x),
        'half each': train_step(shared, x[: batch // PROCESSES].clone()),
    }

    def until_all_are_done(step: Step) -> None:
        step()
        torch.distributed.barrier()

    if rank:
        # The first one reports.
        sys.stdout = open(os.devnull, 'w')
    steps = {name: partial(until_all_are_done, step) for name, step in steps.items()}
    seconds = interleaved(steps, repeats, 'cpu')
    if rank == 0:
        Path(folder, 'seconds.json').write_text(json.dumps(seconds))
    torch.distributed.destroy_process_group()


def processes(repeats: int, nfe: int = 12, batch: int = 16) -> Dict[str, Any]:
    """Images a second of two processes of one thread each beside one such process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_time_process, (folder, repeats, nfe, batch), PROCESSES)
        seconds = json.loads(Path(folder, 'seconds.json').read_text())
    rates = {
        '1 process': batch / seconds['alone'],
        f'{PROCESSES} processes, a batch each': PROCESSES * batch / seconds['batch each'],
        f'{PROCESSES} processes, one batch together': batch / seconds['half each'],
    }
    caption = f'images a second, batch {batch}, {nfe}+{nfe} NFE'
    return rows(rates, base='1 process', caption=caption, unit='1/s')


def rows(values: Dict[str, float], base: str, caption: str, unit: str = 's') -> Dict[str, Any]:
    """Print and return medians and ratios to ``base``."""
    print(f'\n{caption}')
    width = max(map(len, values))
    for name, value in values.items():
        print(f'  {name:{width}}  {value:10.4g} {unit}   x {value / values[base]:.3f}')
    ratios = {name: value / values[base] for name, value in values.items()}
    return dict(caption=caption, unit=unit, base=base, median=values, ratio=ratios)


def paint(result: Dict[str, Any], path: Path) -> None:
    """Bars of the ratios; for suite scale one curve an axis."""
    ratios = result['ratio']
    if 'batch 8' in ratios:
        figure = Figure(figsize=(9, 3), layout='constrained')
        axes = figure.subplots(1, 4, sharey=True)
        for plot, axis in zip(axes, ('batch', 'resolution', 'width', 'nfe')):
            points = {int(k.split()[1]): v for k, v in ratios.items() if k.startswith(axis)}
            plot.plot(list(points), list(points.values()), marker='o')
            plot.set(xlabel=axis, xscale='log', yscale='log')
            plot.set_xticks(list(points), list(points))
            plot.set_yticks([0.25, 0.5, 1, 2, 4], ['0.25', '0.5', '1', '2', '4'])
            plot.minorticks_off()
            plot.grid(alpha=0.3)
        axes[0].set_ylabel('time of a step')
    else:
        figure = Figure(figsize=(7, 0.4 * len(ratios) + 1.2), layout='constrained')
        plot = figure.subplots()
        bars = plot.barh(list(ratios)[::-1], list(ratios.values())[::-1])
        plot.bar_label(bars, fmt='%.2f', padding=3)
        plot.axvline(1, color='black', linewidth=0.8)
        plot.margins(x=0.12)
        plot.set_xlabel(f'{result["caption"]}; {result["base"]} = 1')
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run a suite and keep what it gave."""
    args = parse_args()
    suites = dict(solver=suite_solver, step=suite_step, memory=suite_memory, scale=suite_scale)
    settings = environment(args.device)
    print(', '.join(f'{key} {value}' for key, value in settings.items()))
    result = suites[args.suite](args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f'{args.suite}.json'
    path.write_text(json.dumps(dict(environment=settings, **result), indent=2))
    paint(result, path.with_suffix('.png'))
    print(f'\n{path}\n{path.with_suffix(".png")}')


if __name__ == '__main__':
    main()
