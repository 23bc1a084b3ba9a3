"""Plot how the solvers approach the equilibrium (paper, Figure 5), over all scales and for each.

For some batches of the config's test data, Broyden, Anderson and plain iteration solve the same
z = f(z) with the same number of calls of f. The picture shows the relative residual
|f(z) - z| / |f(z)| of the iterate at each call: the mean over the batches, and from the lowest
to the highest of them. The numbers go into a JSON file beside the picture.
"""

import argparse
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from mdeq_mm.apis import (
    add_cfg_options,
    add_device_argument,
    check_data,
    find_backbone,
    fit_to_machine,
    load_config,
    load_model,
    one_line_errors,
)
from mdeq_mm.deq import (
    Anderson,
    FixedPointIteration,
    LimitedMemoryBroyden,
    Problem,
    Solver,
    solve,
)

import torch
from matplotlib.figure import Figure
from mmengine.runner import Runner
from torch import Tensor

COLOURS = {'Broyden': 'tab:blue', 'Anderson': 'tab:green', 'plain iteration': 'tab:orange'}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint; random weights without')
    parser.add_argument('--batches', type=int, default=5, help='batches of the test data')
    parser.add_argument('--nfe', type=int, default=30, help='calls of f for each solver')
    parser.add_argument('--memory', type=int, default=10, help='steps Broyden and Anderson keep')
    parser.add_argument('--out', default='work_dirs/convergence.png', help='picture to write')
    add_cfg_options(parser)
    add_device_argument(parser)
    args = parser.parse_args(argv)
    if min(args.batches, args.nfe, args.memory) < 1:
        parser.error('--batches, --nfe and --memory must be at least 1')
    return args


def make_solvers(nfe: int, memory: int) -> dict[str, Solver]:
    """Give the solvers by name, none of which stops before ``nfe`` calls."""
    limits = dict(max_iter=nfe, tol=0)
    return {
        'Broyden': LimitedMemoryBroyden(memory=memory, **limits),
        'Anderson': Anderson(memory=memory, **limits),
        'plain iteration': FixedPointIteration(**limits),
    }


class Recorder:
    """Solves the problems of several batches with several solvers and keeps the residuals.

    Args:
        solvers (dict[str, Solver]): The solvers to compare, by name.

    Attributes:
        traces: By solver, for each batch (T, 1 + S): residuals at each evaluation of f, over all
            scales and for each of the S scales, as means over the batch.
        shapes: (Ci, Hi, Wi) of each scale in the last batch.
    """

    def __init__(self, solvers: dict[str, Solver]) -> None:
        self.solvers = solvers
        self.traces: dict[str, list[Tensor]] = {name: [] for name in solvers}
        self.shapes: list[tuple[int, ...]] = []

    @torch.no_grad()
    def add(self, problem: Problem) -> None:
        """Solve the problem of one batch with each solver."""
        self.shapes = [tuple(shape) for shape in problem.shapes]
        for name, solver in self.solvers.items():
            rows: list[Tensor] = []
            solve(_recorded(problem, rows), problem.start, solver)
            # A solve that gave up (diverged) made fewer calls: the rest stays unknown.
            rows += [torch.full_like(rows[0], float('nan'))] * (solver.max_iter - len(rows))
            self.traces[name].append(torch.stack(rows).cpu())


def _recorded(problem: Problem, rows: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """f that adds to ``rows`` the residuals (1 + S,) of each z it is called with."""

    def recorded(z: Tensor) -> Tensor:
        fz = problem(z)
        pairs = [(fz, z), *zip(problem.maps(fz), problem.maps(z), strict=True)]
        flat = [(new.flatten(1), old.flatten(1)) for new, old in pairs]
        rows.append(torch.stack([_relative(new, old).mean() for new, old in flat]))
        return fz

    return recorded


def _relative(fz: Tensor, z: Tensor) -> Tensor:
    """(N,) ``|f(z) - z| / |f(z)|``."""
    norms = [torch.linalg.vector_norm(v, dim=1) for v in (fz - z, fz)]
    return norms[0] / norms[1].clamp(min=torch.finfo(fz.dtype).tiny)


def record(args: argparse.Namespace) -> tuple[Recorder, float]:
    """Run the model on the test data; the residuals, and the tolerance the config asks for."""
    with one_line_errors('plot_convergence.py'):
        cfg = load_config(args.config, options=args.cfg_options)
        fit_to_machine(cfg)
        check_data(cfg, ('test_dataloader',))
        model = load_model(cfg, args.checkpoint, args.device)
        backbone = find_backbone(model)
    recorder = Recorder(make_solvers(args.nfe, args.memory))
    loader = Runner.build_dataloader(cfg.test_dataloader, seed=0)
    for data in islice(loader, args.batches):
        with torch.no_grad():
            images = model.data_preprocessor(data, False)['inputs']
            recorder.add(backbone.problem(images))
    return recorder, backbone.implicit.current_solver.tol


def paint(recorder: Recorder, tol: float, path: Path) -> None:
    """One plot for all scales together and one for each, with a curve for each solver."""
    titles = ['all scales'] + ['scale {}: {}×{}×{}'.format(*s) for s in _numbered(recorder.shapes)]
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 2.7 * rows + 0.5), layout='constrained')
    plots = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for index, (plot, title) in enumerate(zip(plots, titles, strict=False)):
        for name, traces in recorder.traces.items():
            curves = torch.stack(traces)[..., index]
            calls = range(1, curves.shape[1] + 1)
            low, high = curves.amin(0), curves.amax(0)
            plot.fill_between(calls, low, high, color=COLOURS[name], alpha=0.25, linewidth=0)
            plot.plot(calls, curves.mean(0), color=COLOURS[name], label=name, linewidth=1.4)
        if tol > 0:
            plot.axhline(tol, color='grey', linestyle=':', linewidth=1, label='tol of the config')
        plot.set_title(title, fontsize=10)
        plot.set_yscale('log')
        plot.grid(alpha=0.3)
    for plot in plots[len(titles) :]:
        plot.set_axis_off()
    figure.supxlabel('calls of f', fontsize=10)
    figure.supylabel('relative residual', fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _numbered(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [(number, *shape) for number, shape in enumerate(shapes, start=1)]


def main(argv: list[str] | None = None) -> dict[str, dict[str, list]]:
    """Solve, paint, write the numbers.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        For each solver ``mean``, ``low`` and ``high`` over the batches, each a list over calls of
        residuals: all scales, then each scale.
    """
    args = parse_args(argv)
    recorder, tol = record(args)
    result, path = {}, Path(args.out)
    print(f'residual after {args.nfe} calls of f: all scales | each scale')
    for name, traces in recorder.traces.items():
        curves = torch.stack(traces)
        ends = dict(mean=curves.mean(0), low=curves.amin(0), high=curves.amax(0))
        result[name] = {key: value.tolist() for key, value in ends.items()}
        first, *others = (f'{value:.2e}' for value in result[name]['mean'][-1])
        print(f'  {name:16} {first} | {" ".join(others)}')
    paint(recorder, tol, path)
    # NaN, which JSON lacks, marks the calls after a solver gave up.
    text = json.dumps(dict(shapes=recorder.shapes, residuals=result)).replace('NaN', 'null')
    path.with_suffix('.json').write_text(text)
    print(f'{path}\n{path.with_suffix(".json")}')
    return result


if __name__ == '__main__':
    main()
