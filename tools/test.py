"""Evaluate a checkpoint with a config of mmsegmentation, mmpretrain or mmdetection."""

import argparse
import os
from copy import deepcopy

from mdeq_mm.allocation import keep_freed_memory
from mdeq_mm.apis import (
    add_run_arguments,
    build_runner,
    check_checkpoint,
    check_data,
    check_scales,
    fit_to_machine,
    inner_datasets,
    leave_process_group,
    load_config,
    merge_options,
    one_line_errors,
    set_dataloader_defaults,
    type_name,
)

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults
from mmengine.fileio import dump
from mmengine.runner import Runner

SCOPES = ('mmseg', 'mmpretrain')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='segmentation: folder for the predicted label maps; classification: file for the '
        'results, *.pkl for predictions (default: not written)',
    )
    parser.add_argument(
        '--out-item',
        choices=['metrics', 'pred'],
        help='classification: what goes into --out (default: pred)',
    )
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for images of the predictions (default: none)')
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds that --show shows an image (default: %(default)s)',
    )
    parser.add_argument(
        '--interval',
        type=int,
        default=1,
        help='classification: show every N-th image (default: %(default)s)',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation by tta_pipeline and tta_model of the config; '
        'without them a classification config averages over a flip',
    )
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def check_flags(cfg: Config, args: argparse.Namespace) -> None:
    """Refuse flags that this config cannot use.

    Raises:
        ValueError: Names the flag and the remedy.
    """
    scope = cfg.get('default_scope')
    used = [f'--{f}' for f in ('out', 'show', 'tta') if getattr(args, f)]
    used += ['--show-dir'] if args.show_dir else []
    if used and scope not in SCOPES:
        raise ValueError(
            f'{", ".join(used)}: known for default_scope {" and ".join(SCOPES)}, '
            f'but {args.config} has {scope!r}'
        )
    if args.out_item and (args.out is None or scope == 'mmseg'):
        raise ValueError('--out-item says what goes into --out FILE of a classification config')
    if args.out and scope == 'mmpretrain':
        endings = ('.pkl', '.pickle')
        if args.out_item == 'metrics':
            endings += ('.json', '.yaml', '.yml')
        if not args.out.endswith(endings):
            raise ValueError(f'--out {args.out}: want a file ending in {", ".join(endings)}')
    if not (args.show or args.show_dir):
        return
    if 'visualization' not in cfg.get('default_hooks', {}):
        raise ValueError(
            f'--show, --show-dir: {args.config} has no default_hooks.visualization; add it'
        )
    if args.tta and scope == 'mmpretrain':
        raise ValueError(
            "--show, --show-dir: mmpretrain's hook does not work with --tta; use one of them"
        )


def set_painting(cfg: Config, args: argparse.Namespace) -> None:
    """Set up the visualization hook for ``--show`` and ``--show-dir``."""
    hook = cfg.default_hooks.visualization
    hook.show, hook.wait_time, hook.interval = args.show, args.wait_time, args.interval
    if cfg.default_scope == 'mmpretrain':
        hook.enable, hook.out_dir = True, args.show_dir
        return
    hook.draw = True
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def set_map_folder(cfg: Config, folder: str) -> None:
    """Let a segmentation config's IoUMetric write the predicted label maps."""
    evaluators = cfg.test_evaluator
    evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
    for evaluator in evaluators:
        # Other metrics, such as those of a second task, have no maps to write.
        if type_name(evaluator).endswith('IoUMetric'):
            evaluator.output_dir = folder


def set_tta(cfg: Config) -> None:
    """Wrap the model and replace the pipeline, for test-time augmentation.

    Raises:
        ValueError: If a segmentation config lacks tta_pipeline or tta_model.
    """
    if cfg.default_scope == 'mmpretrain':
        cfg.setdefault('tta_model', dict(type='AverageClsScoreTTA'))
        if cfg.get('tta_pipeline') is None:
            dataset = next(inner_datasets(cfg.test_dataloader.dataset))
            *steps, pack = deepcopy(dataset['pipeline'])
            flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
            steps.append(dict(type='TestTimeAug', transforms=[flips, [pack]]))
            cfg.tta_pipeline = steps
    for name in ('tta_model', 'tta_pipeline'):
        if cfg.get(name) is None:
            raise ValueError(f'--tta: the config has no {name}; add one')
    for dataset in inner_datasets(cfg.test_dataloader.dataset):
        dataset['pipeline'] = cfg.tta_pipeline
    # A copy leaves classes of a pure-Python config as they were written, so that it can be dumped.
    model = deepcopy(cfg.tta_model)
    model.module = cfg.model
    cfg.model = model


def prepare(args: argparse.Namespace) -> Config:
    """Make the config ready and check every file it names.

    Raises:
        FileNotFoundError: If the config, the checkpoint or the data set is missing.
        ValueError: If a flag does not fit the config.
    """
    cfg = load_config(args.config, args.work_dir, args.launcher)
    check_flags(cfg, args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    check_checkpoint(args.checkpoint)
    missing = [n for n in ('test_dataloader', 'test_cfg', 'test_evaluator') if cfg.get(n) is None]
    if missing:
        raise ValueError(f'{args.config} has no {", ".join(missing)}, which a test needs; add them')
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir:
        set_painting(cfg, args)
    if args.out and cfg.default_scope == 'mmseg':
        set_map_folder(cfg, args.out)
    set_dataloader_defaults(cfg, not args.no_pin_memory)
    merge_options(cfg, args.cfg_options)
    check_scales(cfg.model)
    # After the options, which name the parts of the model as they are in the config.
    if args.tta:
        set_tta(cfg)
    fit_to_machine(cfg)
    if cfg.load_from != args.checkpoint:
        check_checkpoint(cfg.load_from)
    check_data(cfg, ('test_dataloader',))
    return cfg


def main(argv: list[str] | None = None) -> tuple[Runner, dict]:
    """Evaluate.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        The Runner and the metrics by name.
    """
    args = parse_args(argv)
    with one_line_errors('test.py'):
        cfg = prepare(args)
    runner = build_runner(cfg)
    dumps = args.out and cfg.default_scope == 'mmpretrain'
    if dumps and args.out_item != 'metrics':
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if dumps and args.out_item == 'metrics' and is_main_process():
        dump(metrics, args.out)
    leave_process_group()
    return runner, metrics


if __name__ == '__main__':
    keep_freed_memory()
    main()
