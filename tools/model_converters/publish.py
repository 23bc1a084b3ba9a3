"""Reduce a trained checkpoint to weights that come with the package, and measure them.

The file holds the weights in float32. Its ``meta`` holds the text of the config that trained them,
the seed, the metrics that the run logged on the way, the metrics measured now on all test images,
and the version of the package. Everything in it is plain data.
"""

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from mdeq_mm import __version__
from mdeq_mm.apis import (
    add_cfg_options,
    build_runner,
    check_data,
    fit_to_machine,
    load_config,
    load_model,
    one_line_errors,
    set_dataloader_defaults,
)
from mdeq_mm.compat import verify_checkpoint

import torch
from mmengine.config import Config

# Every clone and every install carries the files.
LIMIT = 1_500_000
# What the Runner notes in a checkpoint's meta, and what stays of it.
ORIGIN = ('cfg', 'seed', 'dataset_meta')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file; the weights get its name')
    parser.add_argument('checkpoint', help='checkpoint file, in the folder of its run')
    parser.add_argument(
        '--out-dir',
        default='mdeq_mm/weights',
        help='folder for the weights (default: %(default)s)',
    )
    add_cfg_options(parser)
    return parser.parse_args(argv)


def reduce(content: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """What stays of a checkpoint: weights in float32, and where they come from.

    Raises:
        ValueError: If train.py did not write it.
    """
    meta = content.get('meta') or {}
    missing = [name for name in ORIGIN if name not in meta]
    if missing:
        raise ValueError(
            f'{checkpoint} does not say how it was trained (no {", ".join(missing)} in its meta): '
            'want a file that tools/train.py wrote'
        )
    items = content['state_dict'].items()
    state = {name: v.float() if v.is_floating_point() else v for name, v in items}
    origin = {name: meta[name] for name in ORIGIN}
    return dict(state_dict=state, meta=dict(origin, mdeq_mm_version=__version__))


def read_log(folder: Path, names: list[str]) -> list[dict[str, float]]:
    """The metrics of these names that a run logged, with the epoch or iteration as ``step``.

    Raises:
        FileNotFoundError: If the folder has no log of a run.
    """
    # A resumed run has a log for each part.
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    if not logs:
        raise FileNotFoundError(
            f'{folder} has no */vis_data/scalars.json, the log of a run: give a checkpoint that '
            'lies where train.py wrote it'
        )
    found = {}
    for line in (line for log in logs for line in log.read_text().splitlines()):
        record = json.loads(line)
        metrics = {name: round(record[name], 4) for name in names if name in record}
        if metrics:
            found[record['step']] = dict(step=record['step'], **metrics)
    return [found[step] for step in sorted(found)]


def measure(cfg: Config, content: dict[str, Any]) -> dict[str, float]:
    """The metrics of the weights on all test images of the config."""
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir, cfg.load_from = folder, str(Path(folder, 'reduced.pth'))
        torch.save(content, cfg.load_from)
        metrics = build_runner(cfg).test()
    return {name: round(float(value), 4) for name, value in metrics.items()}


def prepare(args: argparse.Namespace) -> tuple[Config, dict[str, Any]]:
    """Check everything that the command line names.

    Raises:
        FileNotFoundError: If the config, the checkpoint or the data set is missing.
        UnsafeCheckpointError: If loading the checkpoint could run code.
        ValueError: If the checkpoint is not one of this config, or its weights are too large.
    """
    cfg = load_config(args.config, options=args.cfg_options)
    content = reduce(verify_checkpoint(args.checkpoint), args.checkpoint)
    read_log(Path(args.checkpoint).parent, [])
    load_model(cfg, args.checkpoint, 'cpu')
    size = len(saved(content))
    if size > LIMIT:
        raise ValueError(
            f'{args.checkpoint}: its weights take {size:,} bytes in float32, more than {LIMIT:,}, '
            'which every clone and every install would carry. Train a smaller net'
        )
    set_dataloader_defaults(cfg)
    fit_to_machine(cfg)
    check_data(cfg, ('test_dataloader',))
    return cfg, content


def saved(content: dict[str, Any]) -> bytes:
    """The bytes of a file that torch.load reads."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> Path:
    """Check, measure and write.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        The file.
    """
    args = parse_args(argv)
    with one_line_errors('publish.py'):
        cfg, content = prepare(args)
    metrics = measure(cfg, content)
    log = read_log(Path(args.checkpoint).parent, list(metrics))
    content['meta'].update(metrics=metrics, log=log)
    path = Path(args.out_dir, Path(args.config).stem).with_suffix('.pth')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(saved(content))
    print(f'{path}: {path.stat().st_size:,} bytes, {metrics}')
    return path


if __name__ == '__main__':
    main()
