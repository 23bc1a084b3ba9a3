"""Measure what a warm start saves on a pan: calls of f, and labels that differ from a cold start.

A window moves over each image by so many pixels a frame. Each frame is segmented four times by the
same solver at the same tolerance: from zeros, from the equilibrium of the frame before it, from
there with the history of that solve, and so again with the equilibrium first moved along. The first
frame of a pan, cold in every case, is left out.

Two solves that stop at a loose tolerance differ, wherever they began. How far either is from the
equilibrium is shown by the labels of a further, cold solve to a tenth of the smallest tolerance, or
to 1e-5 where that is zero, which is for a budget without a tolerance.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdeq_mm.apis import (
    add_cfg_options,
    add_device_argument,
    find_backbone,
    load_config,
    load_model,
    one_line_errors,
)
from mdeq_mm.apis.video import Frames, image_batch
from mdeq_mm.deq import PreviousStart, ZeroStart

import numpy as np
import torch
from torch import Tensor, nn

# What a warm solve begins with, as options of PreviousStart.
WARM = {
    'equilibrium': {},
    'history': dict(history=True),
    'motion': dict(history=True, motion=2),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('config', help='config file of a segmentation model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('images', help='folder of images to pan over')
    parser.add_argument(
        '--count', type=int, default=4, help='number of images, spread over the folder'
    )
    parser.add_argument('--frames', type=int, default=8, help='frames of each pan')
    parser.add_argument(
        '--window',
        type=int,
        nargs=2,
        default=(160, 224),
        metavar=('H', 'W'),
        help='rows and columns of the window',
    )
    parser.add_argument(
        '--pixels',
        type=int,
        nargs='+',
        default=(1, 2, 4),
        help='pixels that the window moves a frame',
    )
    parser.add_argument(
        '--tol', type=float, nargs='+', default=(1e-2, 1e-3), help='tolerances of the solver'
    )
    parser.add_argument('--max-iter', type=int, default=60, help='calls of f a solve may take')
    parser.add_argument('--out', default='work_dirs/warm_start.json', help='file of the numbers')
    add_cfg_options(parser)
    add_device_argument(parser)
    args = parser.parse_args(argv)
    if args.count < 1 or args.frames < 2 or min(args.pixels) < 0:
        parser.error('--count must be at least 1, --frames at least 2, --pixels at least 0')
    return args


def pan(image: np.ndarray, window: tuple[int, int], pixels: int, count: int) -> list[np.ndarray]:
    """Frames (H, W, 3) of a window that moves to the right from an image's left edge.

    Raises:
        ValueError: If the window would leave the image.
    """
    height, width = window
    needed = width + pixels * (count - 1)
    if height > image.shape[0] or needed > image.shape[1]:
        raise ValueError(
            f'a pan of {count} frames of {height}x{width} by {pixels} pixels needs images of '
            f'{height}x{needed} or more, got {image.shape[0]}x{image.shape[1]}'
        )
    top = (image.shape[0] - height) // 2
    return [image[top : top + height, i * pixels : i * pixels + width] for i in range(count)]


@torch.no_grad()
def solve_pan(
    model: nn.Module, batches: list[dict[str, Any]], start: ZeroStart
) -> Iterator[tuple[int, Tensor]]:
    """Calls of f and labels (H, W) of each frame."""
    implicit = find_backbone(model).implicit
    implicit.start = start
    for batch in batches:
        sample = model.test_step(dict(batch))[0]
        yield int(implicit.forward_stats.num_iter[0]), sample.pred_sem_seg.data[0]


def labels_equal(one: list[tuple[int, Tensor]], other: list[tuple[int, Tensor]]) -> float:
    """Share of the labels that are equal, the first frame left out."""
    pairs = list(zip(one, other, strict=True))[1:]
    return float(np.mean([(a == b).float().mean().item() for (_, a), (_, b) in pairs]))


def compare(
    cold: list[list[tuple[int, Tensor]]],
    warm: list[list[tuple[int, Tensor]]],
    exact: list[list[tuple[int, Tensor]]],
) -> dict[str, float]:
    """Mean calls of f a frame, and shares of equal labels, over pans of the same frames."""
    cold_calls, warm_calls = (
        float(np.mean([calls for solved in pans for calls, _ in solved[1:]]))
        for pans in (cold, warm)
    )

    def equal(one: list, other: list) -> float:
        return float(np.mean([labels_equal(a, b) for a, b in zip(one, other, strict=True)]))

    return dict(
        cold=cold_calls,
        warm=warm_calls,
        ratio=warm_calls / cold_calls,
        equal=equal(cold, warm),
        cold_exact=equal(cold, exact),
        warm_exact=equal(warm, exact),
    )


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Print a row for each tolerance and speed, and write them.

    Args:
        argv: The command line; the process's own by default.
    """
    args = parse_args(argv)
    with one_line_errors('warm_start.py'):
        cfg = load_config(args.config, options=args.cfg_options)
        images = list(Frames(args.images))
        chosen = np.linspace(0, len(images) - 1, min(args.count, len(images))).astype(int)
        pans = {
            pixels: [pan(images[i], tuple(args.window), pixels, args.frames) for i in chosen]
            for pixels in args.pixels
        }
        model = load_model(cfg, args.checkpoint, args.device)
        implicit = find_backbone(model).implicit
        solver = implicit.solver.replace(jitter=None, max_iter=args.max_iter, tol=min(args.tol))
    batches = {
        pixels: [[image_batch(cfg, frame[..., ::-1]) for frame in frames] for frames in moving]
        for pixels, moving in pans.items()
    }

    def solved(pixels: int, start: type[ZeroStart], tol: float, max_iter: int, **options) -> list:
        implicit.eval_solver = solver.replace(max_iter=max_iter, tol=tol)
        return [list(solve_pan(model, frames, start(**options))) for frames in batches[pixels]]

    print('pixels  tol      warm by      cold   warm   ratio  cold=warm  cold=exact  warm=exact')
    rows = []
    for pixels in args.pixels:
        exact = solved(pixels, ZeroStart, solver.tol / 10 or 1e-5, max(100, 2 * args.max_iter))
        for tol in args.tol:
            cold = solved(pixels, ZeroStart, tol, args.max_iter)
            for name, options in WARM.items():
                warm = solved(pixels, PreviousStart, tol, args.max_iter, **options)
                row = dict(pixels=pixels, tol=tol, start=name, **compare(cold, warm, exact))
                rows.append(row)
                shares = ('equal', 'cold_exact', 'warm_exact')
                print(
                    f'{pixels:<7} {tol:<8g} {name:<12} {row["cold"]:<6.1f} {row["warm"]:<6.1f} '
                    f'{row["ratio"]:<6.2f}',
                    *(f'{100 * row[share]:.2f}%' for share in shares),
                    flush=True,
                )
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2))
    return rows


if __name__ == '__main__':
    main()
