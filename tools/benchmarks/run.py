"""Measure this project and others on the same work, in one process.

    python tools/benchmarks/run.py --suite {f,solver,step,memory,scale,learn,gpu}

f:      one evaluation of f and one vjp to its state, by fused operations and by torch's; on a CPU
        also what part of it is convolution, beside the speed of a matrix product.
solver: time of a solve over the time of its evaluations of f, for every solver.
step:   a training step (forward and backward) of the tiny CIFAR-10 network at the same number of
        evaluations, beside torchdeq's solvers on the same f, plain backpropagation through as many
        layers, mmpretrain's ResNet-101 with a CIFAR stem, and the same evaluations of f and vjp
        without a solver, which is as fast as any solver can be. With --net large or cityscapes time
        and peak memory of that model beside ResNet-101 and beside mmsegmentation's HRNet-W18.
memory: peak memory of a step over what was there before it, at growing max_iter, and of
        mmsegmentation's HRNet-W18 on the same crop.
scale:  how the step grows with batch, resolution, width and evaluations, and on CPUs with a second
        process.
learn:  CPU time of training to a wanted accuracy on one thread: a recipe of few evaluations, the
        paper's, and torchdeq's solver with its published recipe on the same net and data.
gpu:    time and peak memory of a step for every combination of memory format, kernel of the norms,
        precision and compilation, beside torchdeq and mmpretrain's ResNet-101.

Candidates take turns, so that changes of the machine's speed affect all of them. Ratios are those
of the fastest runs; medians are given as well. The result is a table, a JSON file and a chart in
--out. Suite gpu has one candidate in memory at a time, keeps earlier measurements on the same card,
and writes its table to a Markdown file. torchdeq is optional.
"""

import argparse
import re
from pathlib import Path

from mdeq_mm.allocation import keep_freed_memory

import explicit
import f
import gpu
import learn
import memory
import report
import scale
import solver
import step
import torch

SUITES = dict(f=f, solver=solver, step=step, memory=memory, scale=scale, learn=learn, gpu=gpu)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--suite', required=True, choices=SUITES, help='what to measure')
    parser.add_argument(
        '--repeats',
        type=int,
        default=5,
        help='rounds, each of which runs every candidate once; seeds of suite learn',
    )
    parser.add_argument(
        '--batch', type=int, default=32, help='images in a batch (suites f, solver, step, gpu)'
    )
    parser.add_argument(
        '--net',
        default='tiny',
        choices=('tiny', *explicit.PAIRS),
        help='model of suites f and step; in step, large and cityscapes have budgets of their own',
    )
    parser.add_argument(
        '--nfe',
        type=int,
        default=24,
        help='evaluations of f in each pass; an upper bound in suite gpu',
    )
    parser.add_argument(
        '--only',
        type=re.compile,
        default='',
        metavar='PATTERN',
        help='measure only the rows whose name contains this regular expression (suite gpu)',
    )
    parser.add_argument(
        '--crop',
        type=int,
        nargs=2,
        default=(512, 1024),
        metavar=('H', 'W'),
        help='rows and columns of the image, of suite memory and of --net cityscapes',
    )
    parser.add_argument(
        '--task', default='digits', choices=learn.TASKS, help='images of suite learn'
    )
    parser.add_argument('--data-root', help='their folder (default: data/TASK)')
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', default=default, help='where to compute')
    parser.add_argument(
        '--out', default='work_dirs/benchmark', help='folder for the JSON file and the chart'
    )
    args = parser.parse_args(argv)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: torch {torch.__version__} finds no GPU here')
    return args


def main(argv: list[str] | None = None) -> None:
    """Run a suite and write its results."""
    args = parse_args(argv)
    suite = SUITES[args.suite]
    settings = report.environment(args.device)
    print(', '.join(f'{key} {value}' for key, value in settings.items()))
    result = {'environment': settings, **suite.measure(args)}
    name = args.suite if args.net == 'tiny' else f'{args.suite}_{args.net}'
    path = Path(args.out, f'{name}.json')
    report.write(result, path)
    shown = path.with_suffix(getattr(suite, 'REPORT_SUFFIX', '.png'))
    getattr(suite, 'paint', report.paint)(result, shown)
    print(f'\n{path}\n{shown}')


if __name__ == '__main__':
    keep_freed_memory()
    main()
