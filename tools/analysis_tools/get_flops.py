"""Count parameters and operations: of the stem, of one call of f, of the head, and times NFE.

Counted are convolutions and matrix products, a multiplication and an addition as two operations.
Nothing is computed: the model lives on the meta device, so any size of picture takes no memory.
The solver may stop before max_iter, so the last number is an upper bound.
"""

import argparse
from dataclasses import dataclass

from mdeq_mm.apis import add_cfg_options, build_model, find_backbone, load_config, one_line_errors
from mdeq_mm.deq.solvers.base import Function

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="rows and columns of the picture (default: the config's crop_size, else 224 224)",
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


@dataclass
class Cost:
    """Parameters and operations for one picture.

    Attributes:
        stem, call, head: (parameters, operations) of stem and injection, of one call of f, and of
            neck and head.
        nfe: Calls of f in a forward pass at most, with the one that follows the solve.
        state: Numbers in the state z.
    """

    stem: tuple[int, int]
    call: tuple[int, int]
    head: tuple[int, int]
    nfe: int
    state: int

    @property
    def total(self) -> tuple[int, int]:
        """Parameters and operations of the whole forward pass."""
        parameters = self.stem[0] + self.call[0] + self.head[0]
        return parameters, self.stem[1] + self.nfe * self.call[1] + self.head[1]

    def __str__(self) -> str:
        rows = [
            ('stem', *self.stem),
            ('one call of f', *self.call),
            ('head', *self.head),
            (f'in all, {self.nfe} calls of f', *self.total),
        ]
        lines = [f'{"":24}{"parameters":>14}{"GFLOP":>12}']
        lines += [f'{name:24}{count:14,}{flops / 1e9:12.3f}' for name, count, flops in rows]
        return '\n'.join([*lines, f'state z: {self.state:,} numbers'])


class _OneCall(nn.Module):
    """In place of an implicit layer: one call of f, with the counter read before and after."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter, self.marks, self.state = counter, [], 0

    def forward(self, f: Function, z0: Tensor, f_of_rows: object = None) -> Tensor:
        self.state = z0.shape[1]
        self.marks.append(self.counter.get_total_flops())
        with parametrize.cached():
            out = f(z0)
        self.marks.append(self.counter.get_total_flops())
        return out


def _parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@torch.no_grad()
def count(model: nn.Module, shape: tuple[int, int]) -> Cost:
    """Count for one picture of (H, W); auxiliary heads, which serve training alone, left out.

    Args:
        model: A segmentor or classifier of MM on the meta device, with one MDEQ.
        shape: Rows and columns.

    Raises:
        ValueError: If the model has no MDEQ, or several.
    """
    backbone = find_backbone(model)
    implicit = backbone.implicit
    # Calls of the solver and one more; as many as there are layers where they are unrolled.
    nfe = implicit.unrolled_layers or implicit.current_solver.max_iter + 1
    x = torch.zeros(1, backbone.stem[0].in_channels, *shape, device='meta')
    counter = FlopCounterMode(display=False)
    backbone.implicit = one = _OneCall(counter)
    try:
        with counter:
            model(x, mode='tensor')
    finally:
        backbone.implicit = implicit
    before, after = one.marks
    auxiliary = [m for n, m in model.named_children() if n == 'auxiliary_head']
    stem, f = _parameters(backbone.stem, backbone.injection), _parameters(backbone.cell)
    head = _parameters(model) - _parameters(*auxiliary) - stem - f
    return Cost(
        stem=(stem, before),
        call=(f, after - before),
        head=(head, counter.get_total_flops() - after),
        nfe=nfe,
        state=one.state,
    )


def main(argv: list[str] | None = None) -> Cost:
    """Count and print.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        What was counted.
    """
    args = parse_args(argv)
    with one_line_errors('get_flops.py'):
        cfg = load_config(args.config, options=args.cfg_options)
        with torch.device('meta'):
            model = build_model(cfg)
        shape = tuple(args.shape or cfg.get('crop_size') or (224, 224))
        cost = count(model, shape)
    print('one picture of {} x {}'.format(*shape))
    print(cost)
    return cost


if __name__ == '__main__':
    main()
