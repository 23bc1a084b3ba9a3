"""Metrics and residual of a checkpoint by the evaluations of f that its solver may spend."""

import argparse
import json
from pathlib import Path

from mdeq_mm.apis import (
    add_cfg_options,
    build_runner,
    check_checkpoint,
    check_data,
    check_scales,
    evaluations_allowed,
    find_backbone,
    fit_to_machine,
    load_config,
    one_line_errors,
)

from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

# The solver's own residual, which is drawn below every metric.
RESIDUAL = 'deq_residual'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--nfe',
        type=int,
        nargs='+',
        default=[2, 4, 8, 12, 16, 20, 26],
        help='max_iter to try (default: %(default)s)',
    )
    parser.add_argument('--metric', help='metric to draw (default: the first one)')
    parser.add_argument(
        '--out',
        default='work_dirs/accuracy_vs_nfe.png',
        help='image to write; numbers go into a .json file beside it (default: %(default)s)',
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if min(args.nfe) < 1:
        parser.error(f'--nfe {min(args.nfe)}: must be at least 1')
    return args


def prepare(args: argparse.Namespace) -> Config:
    """Read the config and check every file it names.

    Raises:
        FileNotFoundError: If the config, the checkpoint or the data set is missing.
        ValueError: If the config describes no data or no equilibrium to test.
    """
    cfg = load_config(args.config, options=args.cfg_options)
    check_scales(cfg.model)
    fit_to_machine(cfg)
    check_checkpoint(args.checkpoint)
    check_data(cfg, ('test_dataloader',))
    cfg.load_from, cfg.resume = args.checkpoint, False
    cfg.work_dir = str(Path(args.out).resolve().with_suffix(''))
    return cfg


def measure(runner: Runner, counts: list[int]) -> list[dict[str, float]]:
    """Test once for each number of evaluations.

    Returns:
        For each: ``nfe`` (the number allowed), the metrics, and the solver's ``deq_*`` if the
            config has a SolverStatsHook.

    Raises:
        ValueError: If the model has no equilibrium, or several.
    """
    implicit = find_backbone(runner.model).implicit
    if implicit.unrolled_layers:
        raise ValueError(f'this net unrolls {implicit.unrolled_layers} layers and has no solver')
    found = []
    for count in counts:
        with evaluations_allowed(implicit, count):
            metrics = {name: float(value) for name, value in runner.test().items()}
        scalars = runner.message_hub.log_scalars
        names = [key for key in scalars if key.startswith('test/test/deq_')]
        deq = {key.removeprefix('test/test/'): scalars[key].current() for key in names}
        found.append(dict(nfe=count, **metrics, **deq))
    return found


def paint(rows: list[dict[str, float]], metric: str, path: Path) -> None:
    """The metric, and below it the residual, against the evaluations allowed."""
    figure = Figure(figsize=(6, 4.5), layout='constrained')
    names = [metric] + ([RESIDUAL] if RESIDUAL in rows[0] else [])
    plots = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for plot, name in zip(plots, names):
        plot.plot([r['nfe'] for r in rows], [r[name] for r in rows], marker='o')
        plot.set_ylabel('relative residual' if name == RESIDUAL else name)
        plot.grid(alpha=0.3)
        if name == RESIDUAL:
            plot.set_yscale('log')
    plots[-1].set_xlabel('evaluations of f allowed')
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Measure, print, and write numbers and image.

    Returns:
        What :func:`measure` found.
    """
    args = parse_args(argv)
    with one_line_errors('accuracy_vs_nfe.py'):
        cfg = prepare(args)
    runner = build_runner(cfg)
    with one_line_errors('accuracy_vs_nfe.py'):
        rows = measure(runner, args.nfe)
        names = [n for n in rows[0] if n != 'nfe' and not n.startswith('deq_')]
        metric = args.metric or names[0]
        if metric not in names:
            raise ValueError(f'--metric {metric}: this config measures {", ".join(names)}')
    for row in rows:
        line = '  '.join(f'{name} {value:.4g}' for name, value in row.items())
        print_log(line, logger='current')
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix('.json').write_text(json.dumps(rows, indent=2))
    paint(rows, metric, path)
    print_log(f'{path}, {path.with_suffix(".json")}', logger='current')
    return rows


if __name__ == '__main__':
    main()
