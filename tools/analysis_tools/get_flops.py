"""Count parameters and operations: of the stem, of one evaluation of f, of the head, and of all.

Convolutions and matrix products are counted, in multiply-adds (MAC), which OpenMMLab's tables call
FLOPs, and in floating-point operations (FLOP), two for each. Nothing is computed: the model lives
on the meta device, so an image of any size takes no memory. The solver may stop before max_iter, so
the last row is an upper bound.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mdeq_mm.apis import add_cfg_options, build_model, find_backbone, load_config, one_line_errors
from mdeq_mm.deq import Solver

import torch
from torch import Tensor, nn
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
        help="rows and columns of the image (default: the config's crop_size, else 224 224)",
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


@dataclass
class Cost:
    """Parameters and operations for one image.

    Attributes:
        stem, evaluation, head: (parameters, FLOP) of stem and injection, of one evaluation of f,
            and of neck and head.
        nfe: Most evaluations of f in a forward pass, including the one after the solve.
        state: Numbers in the state z.
        history: Bytes that the solver keeps in addition.
    """

    stem: tuple[int, int]
    evaluation: tuple[int, int]
    head: tuple[int, int]
    nfe: int
    state: int
    history: int

    @property
    def total(self) -> tuple[int, int]:
        """Parameters and FLOP of the whole forward pass."""
        parameters = self.stem[0] + self.evaluation[0] + self.head[0]
        return parameters, self.stem[1] + self.nfe * self.evaluation[1] + self.head[1]

    def __str__(self) -> str:
        rows = [
            ('stem', *self.stem),
            ('one evaluation of f', *self.evaluation),
            ('head', *self.head),
            (f'in all, {self.nfe} evaluations', *self.total),
        ]
        lines = [f'{"":24}{"parameters":>14}{"GMAC":>12}{"GFLOP":>12}']
        lines += [
            f'{name:24}{count:14,}{flop / 2e9:12.3f}{flop / 1e9:12.3f}'
            for name, count, flop in rows
        ]
        history = f'{self.history / 1e6:.1f} MB'
        lines.append(f'state z: {self.state:,} numbers; the solver keeps {history} in addition')
        return '\n'.join(lines)


def _parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@torch.no_grad()
def count(model: nn.Module, shape: tuple[int, int], in_channels: int = 3) -> Cost:
    """Count for one image of (H, W), without auxiliary heads, which only serve training.

    Args:
        model: A segmentor or classifier of MM on the meta device, with one MDEQ.
        shape: Rows and columns.
        in_channels: Channels of the image.

    Raises:
        ValueError: If the model has no MDEQ, or several.
    """
    backbone = find_backbone(model)
    implicit = backbone.implicit
    # Those of the solver and one more; in an unrolled net, the number of layers.
    solver = None if implicit.unrolled_layers else implicit.current_solver
    x = torch.zeros(1, in_channels, *shape, device='meta')
    problem, stem = _flop(lambda: backbone.problem(x))
    _, evaluation = _flop(lambda: problem(problem.start))
    layers, implicit.unrolled_layers = implicit.unrolled_layers, 1
    try:
        _, once = _flop(lambda: model(x, mode='tensor'))
    finally:
        implicit.unrolled_layers = layers
    auxiliary = [m for n, m in model.named_children() if n == 'auxiliary_head']
    cell = _parameters(backbone.cell)
    head = _parameters(model) - _parameters(*auxiliary, backbone)
    return Cost(
        stem=(_parameters(backbone) - cell, stem),
        evaluation=(cell, evaluation),
        head=(head, once - stem - evaluation),
        nfe=implicit.unrolled_layers if solver is None else solver.max_iter + 1,
        state=problem.start.shape[1],
        history=0 if solver is None else _history(solver, problem.start),
    )


def _history(solver: Solver, start: Tensor) -> int:
    """Bytes that a solve keeps in addition to its state (1, D), on the meta device."""
    state = solver.init(start)
    tensors = [v for v in vars(state).values() if isinstance(v, Tensor)] if state else []
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _flop(function: Callable[[], Any]) -> tuple[Any, int]:
    """The result of a function, and the operations it took."""
    with FlopCounterMode(display=False) as counter:
        value = function()
    return value, counter.get_total_flops()


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
