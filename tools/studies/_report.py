"""The results of a study: a Markdown table and a chart."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _studies import Study
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Run = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]


def read_results(study: Study, folder: Path) -> dict[str, list[Run]]:
    """The finished runs of a study, by row in the study's order; rows without any are left out."""
    found = {}
    for name in study.rows:
        paths = sorted(folder.glob(f'{name}_seed*.json'))
        runs = [json.loads(path.read_text()) for path in paths]
        runs = [run for run, path in zip(runs, paths) if path.stem == f'{name}_seed{run["seed"]}']
        if runs:
            found[name] = sorted(runs, key=lambda run: run['seed'])
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds; of a single run its value."""
    text = f'{mean(values):.{digits}f}'
    return f'{text} ± {stdev(values):.{digits}f}' if len(values) > 1 else text


def curve(run: Run, key: str) -> dict[int, float]:
    """A quantity by the evaluations of f."""
    return {point['evaluations']: point[key] for point in run.get('evaluations', ())}


def table(study: Study, runs: Runs, times: Mapping[str, float] | None = None) -> str:
    """A Markdown table, a line for each row.

    Accuracies are percent; in bold that at the evaluations that the row was trained with. The
    residual is relative, there; the radius is the spectral radius, mean over images. Minutes are
    CPU time of the training alone. ``of the first`` compares these, or ``times``, the seconds of an
    iteration of each row, where the baseline is among them.
    """
    if not times or study.baseline not in times:
        times = {name: mean(run['cpu_seconds'] for run in row) for name, row in runs.items()}
    counts = sorted(
        {count for row in runs.values() for run in row for count in curve(run, 'accuracy')}
    )
    head = ['', 'parameters', 'seeds', 'epochs', 'CPU min']
    if study.baseline in times:
        head.append('of the first')
    head += ['accuracy', 'best epoch']
    if counts:
        head += ['residual', 'radius', *(f'at {count}' for count in counts)]
    lines = [head, ['---'] * len(head)]
    for name, row in runs.items():
        lines.append(_line(study, times, name, row, counts))
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _line(
    study: Study,
    times: Mapping[str, float],
    name: str,
    row: Sequence[Run],
    counts: Sequence[int],
) -> list[str]:
    cells = [
        study.rows[name].title,
        f'{row[0]["parameters"]:,}',
        str(len(row)),
        spread([run['epochs'] for run in row], 0) if _differ(row) else str(row[0]['epochs']),
        spread([run['cpu_seconds'] / 60 for run in row]),
    ]
    if study.baseline in times:
        cells.append(f'{times[name] / times[study.baseline]:.2f}' if name in times else '')
    best = [max(epoch['accuracy'] for epoch in run['history']) for run in row]
    cells += [spread([run['accuracy'] for run in row]), spread(best)]
    if not counts:
        return cells
    if not row[0].get('evaluations'):
        return cells + [''] * (len(counts) + 2)
    budget = row[0]['budget']
    residuals = [_at(curve(run, 'residual'), budget) for run in row]
    radii = [run['spectral_radius']['mean'] for run in row]
    cells += [spread(residuals, 3), spread(radii, 2)]
    for count in counts:
        text = spread([curve(run, 'accuracy')[count] for run in row])
        cells.append(f'**{text}**' if count == budget else text)
    return cells


def _differ(row: Sequence[Run]) -> bool:
    return len({run['epochs'] for run in row}) > 1


def _at(values: Mapping[int, float], count: int) -> float:
    """The value at a number of evaluations, or at the next smaller one that was tested."""
    return values[max((c for c in values if c <= count), default=min(values))]


# --- Charts ---------------------------------------------------------------------------------


def chart(study: Study, runs: Runs) -> Figure:
    """Draw the study's chart.

    Where equilibria are compared, accuracy against evaluations of f at test time; else accuracy
    against epochs and against CPU time. Bands are one standard deviation over the seeds.
    """
    if study.baseline is not None:
        figure = Figure(figsize=(8, 5), layout='constrained')
        plot = figure.subplots()
        _draw(plot, study, runs, _by_evaluations)
        plot.set_xscale('log', base=2)
        ticks = sorted({x for row in runs.values() for run in row for x in curve(run, 'accuracy')})
        plot.set_xticks(ticks, [str(tick) for tick in ticks])
        plot.minorticks_off()
        plot.set_xlabel('evaluations of f at test time')
        plot.set_ylabel('test accuracy, %')
        plot.legend(fontsize='small')
    else:
        figure = Figure(figsize=(11, 4.5), layout='constrained')
        left, right = figure.subplots(1, 2, sharey=True)
        _draw(left, study, runs, lambda run: _by_epoch(run, lambda epoch: epoch['epoch']))
        left.set_xlabel('epoch')
        left.set_ylabel('test accuracy, %')
        _draw(right, study, runs, lambda run: _by_epoch(run, lambda e: e['cpu_seconds'] / 60))
        right.set_xlabel('CPU time of training, minutes')
        right.set_xscale('log')
        right.legend(fontsize='small')
    return figure


Curve = tuple[list[float], list[float]]


def _by_evaluations(run: Run) -> Curve:
    values = curve(run, 'accuracy')
    return list(values), list(values.values())


def _by_epoch(run: Run, x: Callable[[Mapping[str, Any]], float]) -> Curve:
    return [x(epoch) for epoch in run['history']], [e['accuracy'] for e in run['history']]


def _draw(plot: Axes, study: Study, runs: Runs, of: Callable[[Run], Curve]) -> None:
    """A curve for each row: the mean over its seeds, in a band."""
    styles = ('-', '--', ':')
    for index, (name, row) in enumerate(runs.items()):
        curves = [of(run) for run in row]
        # Seeds that were trained for different lengths have the shorter one in common.
        length = min(len(ys) for _, ys in curves)
        if not length:
            continue
        xs = [mean(values) for values in zip(*(x[:length] for x, _ in curves))]
        points = [values for values in zip(*(y[:length] for _, y in curves))]
        middle = [mean(values) for values in points]
        colour = f'C{index % 10}'
        marker = 'o' if length <= 12 else None
        plot.plot(
            xs,
            middle,
            color=colour,
            linestyle=styles[index // 10 % 3],
            marker=marker,
            markersize=3,
            label=study.rows[name].title,
        )
        if len(row) > 1:
            off = [stdev(values) for values in points]
            low, high = zip(*((m - d, m + d) for m, d in zip(middle, off)))
            plot.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
    plot.grid(alpha=0.3)
