"""Count parameters and operations: of stem, one evaluation of f, neck and head, and in all.

Counted are convolutions and matrix products. A multiplication and the addition that follows it are
one MAC, which the tables of OpenMMLab and most papers call a FLOP, and two FLOPs. Nothing is
computed: the model lives on the meta device, so any size of image takes no memory. A forward pass
evaluates f once more than the solver, in evaluation mode whatever the gradient; the solver may stop
before max_iter, so that the last row is an upper bound.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mdeq_mm.apis import (
    add_cfg_options,
    build_model,
    find_backbone,
    load_config,
    one_line_errors,
    unrolled,
)
from mdeq_mm.deq import Solver

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar('T')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="rows and columns of the image (default: the config's crop_size, else 224 224)",
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


@dataclass
class Cost:
    """Parameters, operations and memory for one image.

    Attributes:
        stem, call, head: (parameters, FLOPs) of stem and injection, of one evaluation of f, and
            of neck and head.
        nfe: Evaluations of f in a forward pass at most: ``max_iter`` of the solver and the one
            that follows the solve, or the layers of an unrolled net.
        state: Numbers in the state z.
        history: Bytes that the solver keeps beside the state.
    """

    stem: tuple[int, int]
    call: tuple[int, int]
    head: tuple[int, int]
    nfe: int
    state: int
    history: int

    @property
    def total(self) -> tuple[int, int]:
        """Parameters and FLOPs of the whole forward pass."""
        parameters = self.stem[0] + self.call[0] + self.head[0]
        return parameters, self.stem[1] + self.nfe * self.call[1] + self.head[1]

    def __str__(self) -> str:
        rows = [
            ('stem', *self.stem),
            ('one evaluation of f', *self.call),
            ('neck and head', *self.head),
            (f'in all, {self.nfe} evaluations', *self.total),
        ]
        lines = [f'{"":24}{"parameters":>14}{"GMAC":>12}{"GFLOP":>12}']
        for name, count, flops in rows:
            lines.append(f'{name:24}{count:14,}{flops / 2e9:12.3f}{flops / 1e9:12.3f}')
        history = f'{self.history / 1e6:.1f} MB'
        lines.append(f'state z: {self.state:,} numbers; the solver keeps {history} beside it')
        return '\n'.join(lines)


def _parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@torch.no_grad()
def count(model: nn.Module, shape: tuple[int, int], in_channels: int = 3) -> Cost:
    """Count for one image of (H, W); auxiliary heads, which serve training alone, left out.

    Args:
        model: A segmentor or classifier of MM on the meta device, with one MDEQ.
        shape: Rows and columns.
        in_channels: Channels of the image.

    Raises:
        ValueError: If the model has no MDEQ, or several.
    """
    backbone = find_backbone(model)
    layer, x = backbone.implicit, torch.zeros(1, in_channels, *shape, device='meta')
    stem, problem = _flops_of(lambda: backbone.problem(x))
    call, z = _flops_of(lambda: problem(problem.start))
    # One evaluation in the place of the solve: what is left is that of neck and head.
    with unrolled(layer, 1):
        whole, _ = _flops_of(lambda: model(x, mode='tensor'))
    auxiliary = [m for n, m in model.named_children() if n == 'auxiliary_head']
    f = _parameters(backbone.cell)
    before = _parameters(backbone) - f
    after = _parameters(model) - _parameters(*auxiliary, backbone)
    return Cost(
        stem=(before, stem),
        call=(f, call),
        head=(after, whole - stem - call),
        nfe=layer.unrolled_layers or layer.current_solver.max_iter + 1,
        state=z.shape[1],
        history=0 if layer.unrolled_layers else _history(layer.current_solver, z),
    )


def _flops_of(function: Callable[[], T]) -> tuple[int, T]:
    """Floating-point operations of a call, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def _history(solver: Solver, z: Tensor) -> int:
    """Bytes of the tensors that a solve from a state (1, D) on the meta device keeps beside it."""
    state = solver.init(z)
    tensors = [v for v in vars(state).values() if isinstance(v, Tensor)] if state else []
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
        cost = count(model, shape, cfg.model.backbone.get('in_channels', 3))
    print('one image of {} x {}'.format(*shape))
    print(cost)
    return cost


if __name__ == '__main__':
    main()
