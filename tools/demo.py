"""Train a small MDEQ on the digit scenes, evaluate it and show its predictions.

The same by hand: dataset_converters/digit_scenes.py, then train.py with
configs/mdeq_demo_digit_scenes.py. The figure shows scene, ground truth and prediction side by side.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import train
from mdeq_mm.allocation import keep_freed_memory

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / 'configs' / 'mdeq_demo_digit_scenes.py'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--data-root',
        default='data/digit_scenes',
        help='where the scenes go (default: %(default)s)',
    )
    parser.add_argument(
        '--work-dir',
        default=f'work_dirs/{CONFIG.stem}',
        help='folder for logs and results (default: %(default)s)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='settings that win over the config, such as train_cfg.max_iters=500',
    )
    return parser.parse_args()


def predict(runner: Runner, count: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Run the model on ``count`` scenes spread over the validation set.

    Returns:
        For each, the image (H, W, 3) RGB uint8, the true and the predicted labels (H, W).
    """
    dataset = runner.val_dataloader.dataset
    runner.model.eval()
    rows = []
    for index in np.linspace(0, len(dataset) - 1, count).astype(int):
        data = pseudo_collate([dataset[index]])
        image = data['inputs'][0].flip(0).permute(1, 2, 0).numpy()
        with torch.no_grad():
            sample = runner.model.val_step(data)[0]
        maps = (sample.gt_sem_seg.data, sample.pred_sem_seg.data)
        rows.append((image, *(m.squeeze().cpu().numpy() for m in maps)))
    return rows


def paint(rows: list, classes: tuple, palette: list, path: Path) -> None:
    """Write the rows of image, ground truth and prediction, with a legend of the classes."""
    colours = np.array(palette, dtype=np.uint8)
    figure = Figure(figsize=(6.6, 2.1 * len(rows) + 0.9), layout='constrained')
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, (image, truth, prediction) in zip(axes, rows, strict=True):
        shown = (image, colours[truth], colours[prediction])
        for axis, values in zip(line, shown, strict=True):
            axis.imshow(values, interpolation='nearest')
            axis.set_axis_off()
    titles = ('image', 'ground truth', 'prediction')
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    patches = [Patch(color=colours[i] / 255, label=name) for i, name in enumerate(classes)]
    figure.legend(handles=patches, loc='outside lower center', ncols=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Build the data, train, evaluate, and write the figure."""
    args = parse_args()
    converter = TOOLS / 'dataset_converters' / 'digit_scenes.py'
    subprocess.run([sys.executable, str(converter), args.data_root], check=True)
    options = [f'data_root={args.data_root}', *args.cfg_options]
    runner = train.main([str(CONFIG), '--work-dir', args.work_dir, '--cfg-options', *options])
    metrics = runner.val()
    metainfo = runner.val_dataloader.dataset.metainfo
    path = Path(args.work_dir) / 'demo.png'
    paint(predict(runner, count=6), metainfo['classes'], metainfo['palette'], path)
    scenes = len(runner.val_dataloader.dataset)
    print(f'mIoU on {scenes} validation scenes: {metrics["mIoU"]:.1f}')
    print(f'predictions (image | ground truth | prediction): {path}')


if __name__ == '__main__':
    keep_freed_memory()
    main()
