"""Predict an image or a video: an overlay for segmentation, the best classes for classification.

A video, or a folder of its frames, becomes a video of overlays, and the calls of f that each frame
took are printed. With --warm-start a frame's solve begins at the equilibrium of the frame before.

With --equilibrium the result shows the prediction as the equilibrium forms: the solver is stopped
after 1, 2, ... evaluations of f, and the head reads the iterate found so far.
"""

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from mdeq_mm.apis import (
    add_cfg_options,
    add_device_argument,
    evaluations_allowed,
    find_backbone,
    given_or_packaged,
    load_config,
    load_model,
    one_line_errors,
)
from mdeq_mm.apis.video import Frames, VideoFile, image_batch, is_stream
from mdeq_mm.deq import PreviousStart

import cv2
import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from torch import nn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('img', help='image file, video file, or folder of frames')
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file (default: the weights that come with the package for this config)',
    )
    parser.add_argument(
        '--out', help='file to write (default: work_dirs/prediction.png, of a video .mp4)'
    )
    parser.add_argument(
        '--warm-start',
        action='store_true',
        help='begin the solve of a frame at the equilibrium of the frame before it',
    )
    parser.add_argument(
        '--equilibrium',
        nargs='?',
        type=int,
        const=0,
        metavar='N',
        help='show the prediction after 1, 2, ... N evaluations of f (without N: as many as the '
        'config allows)',
    )
    parser.add_argument(
        '--opacity',
        type=float,
        default=0.6,
        help='opacity of the painted classes (default: %(default)s)',
    )
    add_cfg_options(parser)
    add_device_argument(parser)
    args = parser.parse_args(argv)
    stream = is_stream(args.img)
    if args.warm_start and not stream:
        parser.error('--warm-start is for a video or a folder of frames, not for one image')
    if args.equilibrium is not None and stream:
        parser.error('--equilibrium is for one image, not for a video')
    args.out = args.out or f'work_dirs/prediction.{"mp4" if stream else "png"}'
    return args


def read_image(path: str) -> np.ndarray:
    """(H, W, 3) RGB uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'image {path} does not exist')
    image = mmcv.imread(path, channel_order='rgb')
    if image is None:
        raise ValueError(f'{path} is not a readable image')
    return image


@torch.no_grad()
def predict(model: nn.Module, data: dict[str, Any]) -> BaseDataElement:
    """The data sample with the model's predictions."""
    return model.test_step(deepcopy(data))[0]


def predict_by_calls(
    model: nn.Module, data: dict[str, Any], calls: int
) -> list[tuple[BaseDataElement, float | None]]:
    """Predict with the solver stopped after 1, 2, ..., ``calls`` evaluations of f.

    Returns:
        For each, the prediction and the relative residual, which is None for an unrolled net.
    """
    implicit = find_backbone(model).implicit
    calls = calls or implicit.unrolled_layers or implicit.current_solver.max_iter
    found = []
    for number in range(1, calls + 1):
        # From zeros, even if a solve normally starts at the last equilibrium.
        implicit.start.reset()
        with evaluations_allowed(implicit, number):
            sample = predict(model, data)
        stats = implicit.forward_stats
        found.append((sample, None if stats is None else float(stats.residual[0])))
    return found


def class_names(model: nn.Module, count: int) -> list[str]:
    """Names of the classes, or their numbers if no names are known."""
    names = model.dataset_meta.get('classes')
    return list(map(str, names)) if names else [f'class {i}' for i in range(count)]


def overlay(
    model: nn.Module, image: np.ndarray, sample: BaseDataElement, opacity: float, legend: bool
) -> np.ndarray:
    """(H, W, 3), the image with its classes painted over it, as mmsegmentation does."""
    from mmseg.visualization import SegLocalVisualizer

    visualizer = SegLocalVisualizer(vis_backends=None, save_dir=None, alpha=opacity)
    names = model.dataset_meta.get('classes') or [str(i) for i in range(256)]
    # Without a palette, colours that are the same in every run.
    colours = np.random.default_rng(0).integers(0, 256, (len(names), 3)).tolist()
    palette = model.dataset_meta.get('palette') or colours
    visualizer.dataset_meta = dict(classes=names, palette=palette)
    visualizer.add_datasample(
        'prediction', image, sample, draw_gt=False, show=False, with_labels=legend
    )
    return visualizer.get_image()


def best(sample: BaseDataElement, names: list[str], count: int = 5) -> list[tuple[str, float]]:
    """Names and scores of the ``count`` classes of highest score, best first."""
    scores, labels = sample.pred_score.topk(min(count, len(sample.pred_score)))
    return [(names[k], score) for k, score in zip(labels.tolist(), scores.tolist(), strict=True)]


def paint_classes(image: np.ndarray, ranking: list[tuple[str, float]]) -> Figure:
    """The image beside bars of the best classes."""
    figure = Figure(figsize=(7, 2.8), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.imshow(image)
    left.set_axis_off()
    names, scores = zip(*ranking[::-1], strict=True)
    bars = right.barh(range(len(names)), scores)
    right.set_yticks(range(len(names)), names)
    right.bar_label(bars, fmt='%.3f', padding=3)
    right.set(xlim=(0, 1.2 * max(scores)), xlabel='score')
    return figure


def _title(number: int, residual: float | None) -> str:
    calls = f'{number} evaluation{"s" if number > 1 else ""}'
    return calls if residual is None else f'{calls}, residual {residual:.1e}'


def paint_maps_by_calls(
    model: nn.Module, image: np.ndarray, found: list[tuple], opacity: float
) -> Figure:
    """A tile for each number of evaluations, after the image itself."""
    tiles = [('image', image)]
    for number, (sample, residual) in enumerate(found, start=1):
        tile = overlay(model, image, sample, opacity, legend=False)
        tiles.append((_title(number, residual), tile))
    columns = min(5, len(tiles))
    rows = -(-len(tiles) // columns)
    height = 2.4 * image.shape[0] / image.shape[1] + 0.3
    figure = Figure(figsize=(2.4 * columns, height * rows), layout='constrained')
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, tile) in zip(axes, tiles, strict=False):
        axis.imshow(tile, interpolation='nearest')
        axis.set_title(title, fontsize=9)
    return figure


def paint_scores_by_calls(image: np.ndarray, found: list[tuple], names: list[str]) -> Figure:
    """The image, and the scores of the finally best classes against evaluations of f."""
    last = found[-1][0].pred_score
    labels = last.topk(min(5, len(last))).indices.tolist()
    scores = torch.stack([sample.pred_score.cpu() for sample, _ in found])
    residuals = [residual for _, residual in found]
    with_residual = None not in residuals
    figure = Figure(figsize=(10 if with_residual else 7, 2.9), layout='constrained')
    left, middle, *right = figure.subplots(1, 3 if with_residual else 2)
    left.imshow(image)
    left.set_axis_off()
    calls = range(1, len(found) + 1)
    for label in labels:
        middle.plot(calls, scores[:, label], marker='.', label=names[label])
    middle.set(xlabel='evaluations of f', ylabel='score', ylim=(-0.02, 1.02))
    middle.xaxis.set_major_locator(MaxNLocator(integer=True))
    middle.legend(fontsize=8)
    if with_residual:
        right[0].plot(calls, residuals, marker='.', color='black')
        right[0].set(xlabel='evaluations of f', ylabel='relative residual', yscale='log')
        right[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def paint(model: nn.Module, image: np.ndarray, data: dict, args: argparse.Namespace) -> None:
    """Predict as the command line says and write the resulting image."""
    segments = 'pred_sem_seg' in (sample := predict(model, data))
    found = None
    if args.equilibrium is not None:
        found = predict_by_calls(model, data, args.equilibrium)
        sample = found[-1][0]
    names = [] if segments else class_names(model, len(sample.pred_score))
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if segments and found is None:
        mmcv.imwrite(overlay(model, image, sample, args.opacity, True)[..., ::-1], str(path))
        return
    if not segments:
        print('\n'.join(f'{score:.4f}  {name}' for name, score in best(sample, names)))
    if segments:
        figure = paint_maps_by_calls(model, image, found, args.opacity)
    elif found is None:
        figure = paint_classes(image, best(sample, names))
    else:
        figure = paint_scores_by_calls(image, found, names)
    figure.savefig(path, dpi=110)


def paint_frame(
    model: nn.Module, frame: np.ndarray, sample: BaseDataElement, opacity: float
) -> np.ndarray:
    """The frame (H, W, 3), BGR, with its classes painted over it or the best one's name."""
    if 'pred_sem_seg' in sample:
        image = np.ascontiguousarray(frame[..., ::-1])
        return np.ascontiguousarray(overlay(model, image, sample, opacity, False)[..., ::-1])
    names = class_names(model, len(sample.pred_score))
    ((name, score),) = best(sample, names, count=1)
    painted = frame.copy()
    # Dark under light, to be read on any image.
    for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        place, font = (4, frame.shape[0] - 6), cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(painted, f'{name} {score:.2f}', place, font, 0.5, colour, width, cv2.LINE_AA)
    return painted


def begin_warm(model: nn.Module, cfg: Config) -> None:
    """Have the solve of a frame begin at the last frame's equilibrium, with history and motion.

    Raises:
        ValueError: If one frame takes several solves, or none.
    """
    implicit = find_backbone(model).implicit
    if implicit.unrolled_layers:
        raise ValueError('--warm-start: this config unrolls its layers and solves nothing')
    if (cfg.model.get('test_cfg') or {}).get('mode') == 'slide':
        raise ValueError(
            '--warm-start: this config slides a window over the frame, so that the last solve is '
            "another window's. Add --cfg-options model.test_cfg.mode=whole"
        )
    implicit.start = PreviousStart(history=True, motion=2)


def progress(number: int, count: int, calls: int | None) -> None:
    """Print what a frame took; on a terminal with a bar that stays in its line."""
    taken = '' if calls is None else f'{calls} calls of f'
    place = f'frame {number}' + (f' of {count}' if count else '')
    if not sys.stdout.isatty():
        print(f'{place}: {taken}', flush=True)
        return
    done = min(30, 30 * number // count) if count else 0
    bar = f'[{"#" * done:30}] ' if count else ''
    print(f'\r{bar}{place}: {taken:<20}', end='', flush=True)


def predict_stream(
    model: nn.Module, cfg: Config, frames: Frames, video: VideoFile, opacity: float
) -> None:
    """Predict every frame and write the video; an interrupt ends it early."""
    implicit = find_backbone(model).implicit
    taken: list[int] = []
    number = 0
    with video:
        try:
            for number, frame in enumerate(frames, start=1):
                sample = predict(model, image_batch(cfg, frame[..., ::-1]))
                stats = implicit.forward_stats
                calls = None if stats is None else int(stats.num_iter.max())
                taken += [] if calls is None else [calls]
                video.write(paint_frame(model, frame, sample, opacity))
                progress(number, frames.count, calls)
        except KeyboardInterrupt:
            print('\ninterrupted: the frames until here are written', end='')
    mean = f', {np.mean(taken):.1f} calls of f a frame' if taken else ''
    print(f'\n{number} frames{mean}')
    print('\n'.join(map(str, video.paths)))


def main(argv: list[str] | None = None) -> None:
    """Predict and paint.

    Args:
        argv: The command line; the process's own by default.
    """
    args = parse_args(argv)
    with one_line_errors('inference.py'):
        cfg = load_config(args.config, options=args.cfg_options)
        stream = is_stream(args.img)
        source = Frames(args.img) if stream else read_image(args.img)
        video = VideoFile(args.out, source.rate) if stream else None
        checkpoint = given_or_packaged(args.checkpoint, args.config)
        model = load_model(cfg, checkpoint, args.device)
        if args.warm_start:
            begin_warm(model, cfg)
        if stream:
            predict_stream(model, cfg, source, video, args.opacity)
            return
        if args.equilibrium is not None:
            find_backbone(model)
            if args.equilibrium < 0:
                raise ValueError('--equilibrium N must be at least 1')
        data = image_batch(cfg, source, args.img)
    paint(model, source, data, args)
    print(args.out)


if __name__ == '__main__':
    main()
