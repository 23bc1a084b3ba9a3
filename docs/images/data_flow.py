"""Draw how data flows through an MDEQ, forward and backward.

python docs/images/data_flow.py [OUT]
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FORWARD, BACKWARD, PLAIN = 'tab:blue', 'tab:red', '0.93'


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, **style) -> None:
    """A rounded box with its lower left corner at (x, y) and text in its middle."""
    style = dict(facecolor=PLAIN, edgecolor='0.35', linewidth=1) | style
    shape = 'round,pad=0,rounding_size=0.12'
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))
    axes.text(x + width / 2, y + height / 2, text, ha='center', va='center', fontsize=9)


def arrow(axes: Axes, start: tuple, end: tuple, colour: str = FORWARD, bend: float = 0) -> None:
    """An arrow between two points, bent to the side by a share of its length."""
    style = dict(arrowstyle='-|>', mutation_scale=12, color=colour, linewidth=1.4)
    curve = f'arc3,rad={bend}'
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=curve, **style))


def scales(axes: Axes, x: float, y: float, label: str) -> None:
    """A stack of maps, each of half the resolution of the one below."""
    for side in (0.9, 0.45, 0.22, 0.11):
        axes.add_patch(Rectangle((x - side / 2, y), side, side, facecolor='#bcd6ec', edgecolor='k'))
        y += side + 0.09
    axes.text(x, y + 0.08, label, ha='center', va='bottom', fontsize=10)


def paint(axes: Axes) -> None:
    """The whole drawing, in units of about a centimetre."""
    axes.text(0.1, 3.05, 'image', fontsize=9, va='center')
    arrow(axes, (1.0, 3.05), (1.4, 3.05))
    box(axes, 1.4, 2.45, 1.5, 1.2, 'stem\nand injection')
    arrow(axes, (2.9, 3.05), (3.75, 3.05))
    axes.text(3.3, 3.2, 'x', fontsize=11, ha='center')

    box(axes, 3.75, 1.75, 4.6, 3.0, '', facecolor='#f2f7fc', edgecolor=FORWARD)
    axes.text(6.05, 4.5, 'solver, no graph kept', color=FORWARD, ha='center', va='center')
    box(axes, 4.0, 2.35, 2.0, 1.4, 'f(z; x)\none block a scale,\nthen fusion\nof all scales')
    box(axes, 6.75, 2.35, 1.4, 1.4, 'next z\nBroyden,\nAnderson or\nplain step')
    arrow(axes, (6.0, 3.45), (6.75, 3.45), bend=-0.35)
    arrow(axes, (6.75, 2.65), (6.0, 2.65), bend=-0.35)
    text = 'until |f(z) − z| ≤ tol |f(z)|, at most max_iter evaluations'
    axes.text(6.05, 2.02, text, ha='center', va='center', fontsize=8)

    arrow(axes, (8.35, 3.05), (9.05, 3.05))
    axes.text(8.7, 3.2, 'z*', fontsize=11, ha='center')
    box(axes, 9.05, 2.45, 1.5, 1.2, 'f(z*; x)\nonce more,\nwith graph')
    arrow(axes, (10.55, 3.05), (11.1, 3.05))
    scales(axes, 11.65, 2.2, 'all scales')
    arrow(axes, (12.2, 3.05), (12.7, 3.05))
    box(axes, 12.7, 2.45, 1.4, 1.2, 'neck, head')
    arrow(axes, (14.1, 3.05), (14.55, 3.05))
    axes.text(14.65, 3.05, 'loss', fontsize=9, va='center')

    text = 'backward hook: solver for\n$g = J^\\top g + v$, one vjp each'
    box(axes, 8.35, 0.25, 2.9, 1.0, text, facecolor='#fdf1f1', edgecolor=BACKWARD)
    arrow(axes, (14.85, 2.85), (11.25, 0.75), BACKWARD, bend=-0.35)
    axes.text(13.0, 0.55, 'gradient v', color=BACKWARD, fontsize=9)
    arrow(axes, (9.8, 1.25), (9.8, 2.45), BACKWARD)
    axes.text(9.92, 1.75, 'g', color=BACKWARD, fontsize=11)
    arrow(axes, (9.3, 2.45), (2.15, 2.45), BACKWARD, bend=-0.5)
    text = 'through f(z*; x) to the weights of f, injection and stem'
    axes.text(5.7, 0.3, text, color=BACKWARD, fontsize=9, ha='center')


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).with_suffix('.png')
    parser.add_argument('out', nargs='?', type=Path, default=default, help='image to write')
    args = parser.parse_args()
    figure = Figure(figsize=(11.4, 3.9), layout='constrained')
    axes = figure.subplots()
    axes.set(xlim=(0, 15.4), ylim=(0, 5), aspect='equal')
    axes.set_axis_off()
    paint(axes)
    figure.savefig(args.out, dpi=100)


if __name__ == '__main__':
    main()
