"""Plot how the solvers approach the equilibrium (paper, Figure 5), over all scales and for each.

For some batches of the config's test data, Broyden, Anderson and plain iteration solve the same
z = f(z) with the same number of evaluations of f. The plot shows the relative residual
|f(z) - z| / |f(z)| of the iterate at each evaluation: the mean over the batches, and from the
lowest to the highest of them. The numbers go into a JSON file beside the image.
"""

import argparse
import json
from dataclasses import dataclass
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
    spectral_radius,
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
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file (default: random weights)')
    parser.add_argument(
        '--batches', type=int, default=5, help='batches of the test data (default: %(default)s)'
    )
    parser.add_argument(
        '--nfe', type=int, default=30, help='evaluations of f per solver (default: %(default)s)'
    )
    parser.add_argument(
        '--memory',
        type=int,
        default=10,
        help='steps that Broyden and Anderson keep (default: %(default)s)',
    )
    parser.add_argument(
        '--out', default='work_dirs/convergence.png', help='image to write (default: %(default)s)'
    )
    add_cfg_options(parser)
    add_device_argument(parser)
    args = parser.parse_args(argv)
    if min(args.batches, args.nfe, args.memory) < 1:
        parser.error('--batches, --nfe and --memory must be at least 1')
    return args


def make_solvers(nfe: int, memory: int) -> dict[str, Solver]:
    """The solvers by name; none of them stops before ``nfe`` evaluations."""
    limits = dict(max_iter=nfe, tol=0)
    return {
        'Broyden': LimitedMemoryBroyden(memory=memory, **limits),
        'Anderson': Anderson(memory=memory, **limits),
        'plain iteration': FixedPointIteration(**limits),
    }


@dataclass
class Record:
    """How the solvers approached the same equilibria.

    Attributes:
        traces: By solver, for each batch (T, 1 + S): residuals at each evaluation of f, over all
            scales and for each of the S scales, as means over the batch.
        radii: For each batch (N,) the spectral radius of the Jacobian of f at the last solver's z.
        shapes: (Ci, Hi, Wi) of each scale.
        tol: Tolerance of the config's own solver.
    """

    traces: dict[str, list[Tensor]]
    radii: list[Tensor]
    shapes: list[tuple[int, ...]]
    tol: float


def residuals(f: Problem, solver: Solver) -> tuple[Tensor, Tensor]:
    """(T, 1 + S) residuals of a solve at each evaluation of f, and (N, D) what it found."""
    rows: list[Tensor] = []
    sizes = [torch.Size(shape).numel() for shape in f.shapes]

    def recorded(z: Tensor) -> Tensor:
        fz = f(z)
        parts = zip((fz, *fz.split(sizes, 1)), (z, *z.split(sizes, 1)), strict=True)
        rows.append(torch.stack([_relative(new, old).mean() for new, old in parts]))
        return fz

    z = solve(recorded, f.start, solver).z
    # A solve that diverged made fewer evaluations: the rest stays unknown.
    rows += [torch.full_like(rows[0], float('nan'))] * (solver.max_iter - len(rows))
    return torch.stack(rows).cpu(), z


def _relative(fz: Tensor, z: Tensor) -> Tensor:
    """(N,) ``|f(z) - z| / |f(z)|``."""
    norms = [torch.linalg.vector_norm(v, dim=1) for v in (fz - z, fz)]
    return norms[0] / norms[1].clamp(min=torch.finfo(fz.dtype).tiny)


def record(args: argparse.Namespace) -> Record:
    """Solve the equilibria of some batches of the config's test data."""
    with one_line_errors('plot_convergence.py'):
        cfg = load_config(args.config, options=args.cfg_options)
        fit_to_machine(cfg)
        check_data(cfg, ('test_dataloader',))
        model = load_model(cfg, args.checkpoint, args.device)
        backbone = find_backbone(model)
    solvers = make_solvers(args.nfe, args.memory)
    result = Record({name: [] for name in solvers}, [], [], backbone.implicit.current_solver.tol)
    loader = Runner.build_dataloader(cfg.test_dataloader, seed=0)
    for data in islice(loader, args.batches):
        with torch.no_grad():
            problem = backbone.problem(model.data_preprocessor(data, False)['inputs'])
            for name, solver in solvers.items():
                trace, z = residuals(problem, solver)
                result.traces[name].append(trace)
        result.radii.append(spectral_radius(problem, z).cpu())
        result.shapes = [tuple(shape) for shape in problem.shapes]
    return result


def paint(record: Record, path: Path) -> None:
    """One plot for all scales together and one per scale, with a curve for each solver."""
    titles = ['all scales'] + ['scale {}: {}×{}×{}'.format(*s) for s in _numbered(record.shapes)]
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 2.7 * rows + 0.5), layout='constrained')
    plots = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for index, (plot, title) in enumerate(zip(plots, titles, strict=False)):
        for name, traces in record.traces.items():
            curves = torch.stack(traces)[..., index]
            calls = range(1, curves.shape[1] + 1)
            low, high = curves.amin(0), curves.amax(0)
            plot.fill_between(calls, low, high, color=COLOURS[name], alpha=0.25, linewidth=0)
            plot.plot(calls, curves.mean(0), color=COLOURS[name], label=name, linewidth=1.4)
        if record.tol > 0:
            plot.axhline(
                record.tol, color='grey', linestyle=':', linewidth=1, label='tol of the config'
            )
        plot.set_title(title, fontsize=10)
        plot.set_yscale('log')
        plot.grid(alpha=0.3)
    for plot in plots[len(titles) :]:
        plot.set_axis_off()
    figure.supxlabel('evaluations of f', fontsize=10)
    figure.supylabel('relative residual', fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _numbered(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [(number, *shape) for number, shape in enumerate(shapes, start=1)]


def main(argv: list[str] | None = None) -> dict[str, dict[str, list]]:
    """Solve, plot, and write the numbers.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        For each solver ``mean``, ``low`` and ``high`` over the batches, each a list over
            evaluations of the residuals of all scales, then of each scale.
    """
    args = parse_args(argv)
    found = record(args)
    result, path = {}, Path(args.out)
    print(f'residual after {args.nfe} evaluations of f: all scales | each scale')
    for name, traces in found.traces.items():
        curves = torch.stack(traces)
        ends = dict(mean=curves.mean(0), low=curves.amin(0), high=curves.amax(0))
        result[name] = {key: value.tolist() for key, value in ends.items()}
        first, *others = (f'{value:.2e}' for value in result[name]['mean'][-1])
        print(f'  {name:16} {first} | {" ".join(others)}')
    radii = torch.cat(found.radii)
    print(f'spectral radius of the Jacobian there: mean {radii.mean():.3f}, max {radii.max():.3f}')
    paint(found, path)
    # NaN, which JSON lacks, marks the evaluations after a solver diverged.
    text = json.dumps(
        dict(shapes=found.shapes, residuals=result, spectral_radius=radii.tolist())
    ).replace('NaN', 'null')
    path.with_suffix('.json').write_text(text)
    print(f'{path}\n{path.with_suffix(".json")}')
    return result


if __name__ == '__main__':
    main()
