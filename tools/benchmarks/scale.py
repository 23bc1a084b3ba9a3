"""Suite scale: how a training step grows, and what a second process on CPUs gains."""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nets import TINY, backbone, train_step
from timing import Result, Step, interleaved

AXES = dict(
    batch=(4, 8, 16, 32), resolution=(16, 32, 48, 64), width=(8, 16, 24, 48), nfe=(6, 12, 18, 24)
)
CENTER = dict(batch=8, resolution=32, width=24, nfe=12)
PROCESSES = 2


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the step of the tiny network along each axis, with the others at their centre."""
    steps: dict[str, Step] = {}
    for axis, values in AXES.items():
        for value in values:
            case = {**CENTER, axis: value}
            net = backbone(args.device, case['nfe'], **TINY, channels=(case['width'],) * 2)
            size = (case['resolution'],) * 2
            x = torch.randn(case['batch'], 3, *size, device=args.device)
            steps[f'{axis} {value}'] = train_step(net, x)
    samples = interleaved(steps, args.repeats, args.device)
    caption = 'training step, each axis alone'
    result = Result.of(samples, f'batch {CENTER["batch"]}', caption)
    print(f'\n{result}')
    if args.device == 'cuda':
        return result.to_dict()
    return dict(result.to_dict(), processes=processes(args.repeats))


def processes(repeats: int, nfe: int = 12, batch: int = 16) -> dict[str, Any]:
    """Seconds per image of two processes of one thread each, and of one such process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_time_process, (folder, repeats, nfe, batch), PROCESSES)
        seconds = json.loads(Path(folder, 'seconds.json').read_text())
    images = {
        '1 process': ('alone', batch),
        f'{PROCESSES} processes, a batch each': ('batch each', PROCESSES * batch),
        f'{PROCESSES} processes, one batch together': ('half each', batch),
    }
    samples = {name: [t / n for t in seconds[case]] for name, (case, n) in images.items()}
    caption = f'time of an image, batch {batch}, {nfe}+{nfe} NFE'
    result = Result.of(samples, '1 process', caption)
    print(f'\n{result}')
    return result.to_dict()


def _time_process(rank: int, folder: str, repeats: int, nfe: int, batch: int) -> None:
    """Time a step of one process alone, and of both with a batch each or half a batch each."""
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


def paint(result: dict[str, Any], path: Path) -> None:
    """Write a chart with one curve per axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout='constrained')
    plots = figure.subplots(1, len(AXES), sharey=True)
    for plot, (axis, values) in zip(plots, AXES.items()):
        plot.plot(values, [result['ratio'][f'{axis} {value}'] for value in values], marker='o')
        plot.set(xlabel=axis, xscale='log', yscale='log')
        plot.set_xticks(values, values)
        plot.set_yticks([0.25, 0.5, 1, 2, 4], ['0.25', '0.5', '1', '2', '4'])
        plot.minorticks_off()
        plot.grid(alpha=0.3)
    plots[0].set_ylabel(f'time of a step, {result["base"]} = 1')
    figure.savefig(path, dpi=120)
