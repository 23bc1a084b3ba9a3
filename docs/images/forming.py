"""Draw the prediction of a segmentor after some evaluations of f, a row for each image.

python docs/images/forming.py CONFIG CHECKPOINT IMAGE [IMAGE ...] [--out OUT]

The image in docs shows scenes 00055 and 00076 of the validation set of mdeq_demo_digit_scenes.py,
chosen among those whose digits are right after 8 evaluations.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mdeq_mm.apis import load_config, load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.analysis_tools.inference import predict_by_calls, prepare, read_image

SHOWN = (1, 2, 4, 8)


def main() -> None:
    """Predict, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file of a segmentor')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('images', nargs='+', help='image files')
    default = Path(__file__).with_suffix('.png')
    parser.add_argument('--out', type=Path, default=default, help='image to write')
    args = parser.parse_args()
    cfg = load_config(args.config)
    model = load_model(cfg, args.checkpoint, 'cpu')
    palette = np.array(model.dataset_meta['palette'], dtype=np.uint8)
    columns = 1 + len(SHOWN)
    figure = Figure(figsize=(1.7 * columns, 1.7 * len(args.images) + 0.3), layout='constrained')
    rows = figure.subplots(len(args.images), columns, squeeze=False)
    for axes, path in zip(rows, args.images, strict=True):
        image = read_image(path)
        found = predict_by_calls(model, prepare(cfg, path, image), max(SHOWN))
        axes[0].imshow(image, interpolation='nearest')
        for axis, count in zip(axes[1:], SHOWN, strict=True):
            sample, residual = found[count - 1]
            labels = sample.pred_sem_seg.data.squeeze().cpu().numpy()
            axis.imshow(palette[labels], interpolation='nearest')
            axis.set_xlabel(f'residual {residual:.2g}', fontsize=8)
    titles = ['image', *(f'{count} evaluation{"s" * (count > 1)}' for count in SHOWN)]
    for axis, title in zip(rows[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in rows.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(args.out, dpi=100)


if __name__ == '__main__':
    main()
