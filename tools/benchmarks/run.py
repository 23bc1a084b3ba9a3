"""Measure this project beside others on the same work, in one process.

    python tools/benchmarks/run.py --suite {f,solver,step,memory,scale}

f:      one evaluation of f and one vjp to its state, by fused operations and by torch's.
solver: time of a solve over the time of its evaluations of f, for every solver.
step:   a training step (forward and backward) of the tiny CIFAR-10 network at the same number of
        evaluations, beside torchdeq's solvers on the same f, plain backpropagation through as many
        layers, mmpretrain's ResNet-101 with a CIFAR stem, and the same evaluations of f and vjp
        without a solver, which is as fast as any solver can be.
memory: peak memory of a step over what was there before it, at growing max_iter, and of
        mmsegmentation's HRNet-W18 on the same crop.
scale:  how the step grows with batch, resolution, width and evaluations, and on CPUs with a second
        process.

Candidates take turns, so that a machine that changes speed does so for all of them. Ratios are
those of the fastest runs; medians stand beside them. The result is a table, a JSON file and a
picture in --out. torchdeq is optional.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import mdeq_mm

import f
import memory
import mmcv
import mmengine
import scale
import solver
import step
import torch
from matplotlib.figure import Figure

SUITES = dict(f=f, solver=solver, step=step, memory=memory, scale=scale)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--suite', required=True, choices=SUITES, help='what to measure')
    parser.add_argument('--repeats', type=int, default=5, help='rounds, of each candidate once')
    parser.add_argument(
        '--batch', type=int, default=32, help='images, of suites f, solver and step'
    )
    parser.add_argument('--nfe', type=int, default=24, help='evaluations of f in either pass')
    parser.add_argument(
        '--crop',
        type=int,
        nargs=2,
        default=(512, 1024),
        metavar=('H', 'W'),
        help='rows and columns of the image, of suite memory',
    )
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', default=default, help='where to compute')
    parser.add_argument('--out', default='work_dirs/benchmark', help='folder of JSON and picture')
    return parser.parse_args(argv)


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name() if device == 'cuda' else platform.processor()
    return dict(
        device=device,
        name=name or platform.machine(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        torch=torch.__version__,
        mmengine=mmengine.__version__,
        mmcv=mmcv.__version__,
        mdeq_mm=mdeq_mm.__version__,
    )


def paint(result: dict[str, Any], path: Path) -> None:
    """Write a picture of the ratios as bars."""
    ratios = result['ratio']
    figure = Figure(figsize=(7, 0.4 * len(ratios) + 1.2), layout='constrained')
    plot = figure.subplots()
    bars = plot.barh(list(ratios)[::-1], list(ratios.values())[::-1])
    plot.bar_label(bars, fmt='%.2f', padding=3)
    plot.axvline(1, color='black', linewidth=0.8)
    plot.margins(x=0.12)
    plot.set_xlabel(f'{result["caption"]}; {result["base"]} = 1')
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Run a suite and keep what it gave."""
    args = parse_args(argv)
    suite = SUITES[args.suite]
    settings = environment(args.device)
    print(', '.join(f'{key} {value}' for key, value in settings.items()))
    result = suite.measure(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f'{args.suite}.json'
    path.write_text(json.dumps(dict(environment=settings, **result), indent=2))
    getattr(suite, 'paint', paint)(result, path.with_suffix('.png'))
    print(f'\n{path}\n{path.with_suffix(".png")}')


if __name__ == '__main__':
    main()
