"""Train a model from a config of mmsegmentation, mmpretrain or mmdetection."""

import argparse
import os

from mdeq_mm.allocation import keep_freed_memory
from mdeq_mm.apis import (
    add_run_arguments,
    build_runner,
    check_checkpoint,
    check_data,
    check_scales,
    find_resumable_checkpoint,
    fit_to_machine,
    leave_process_group,
    load_config,
    merge_options,
    one_line_errors,
    pretrained_files,
    set_dataloader_defaults,
    type_name,
)
from mdeq_mm.optim import has_bfloat16

from mmengine.config import Config
from mmengine.device import is_cuda_available
from mmengine.runner import Runner


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint; without a value, from the latest undamaged one in the '
        'work_dir, or from the beginning if there is none',
    )
    parser.add_argument('--no-validate', action='store_true', help='train without validation')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate with the batch size, from the config's auto_scale_lr",
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='turn off persistent_workers of the data loaders',
    )
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def enable_amp(cfg: Config) -> None:
    """Replace the optimizer wrapper by the one for mixed precision: on a CPU, bfloat16.

    Raises:
        ValueError: If the machine or the config's wrapper does not allow it.
    """
    # A pure-Python config names the class itself.
    kind = type_name(cfg.optim_wrapper) if 'type' in cfg.optim_wrapper else 'OptimWrapper'
    if kind not in ('OptimWrapper', 'AmpOptimWrapper', 'BFloat16OptimWrapper'):
        raise ValueError(
            f'--amp replaces an OptimWrapper, but the config has {kind}; set mixed precision '
            'in its optim_wrapper instead'
        )
    if not is_cuda_available():
        if not has_bfloat16():
            raise ValueError(
                '--amp needs a GPU, or a CPU with instructions for bfloat16, and there is neither; '
                'leave the flag out'
            )
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
        # Nothing is scaled: bfloat16 has the range of float32.
        cfg.optim_wrapper.pop('loss_scale', None)
        return
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def check_activation_checkpointing(cfg: Config) -> None:
    """Refuse to checkpoint the activations of a backbone.

    Raises:
        ValueError: If the config does. mmengine gives the backbone images, which want no gradient,
            so that none reaches its parameters.
    """
    names = cfg.get('activation_checkpointing') or []
    names = [names] if isinstance(names, str) else names
    if any(name.split('.')[0] == 'backbone' for name in names):
        raise ValueError(
            f'activation_checkpointing={list(names)} leaves the backbone without gradients; take '
            'it out. An MDEQ keeps the graph of one evaluation of f and does not need it'
        )


def apply_flags(cfg: Config, args: argparse.Namespace) -> None:
    """Write the flags into the config, then ``--cfg-options`` over them."""
    if args.amp:
        enable_amp(cfg)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ValueError(
                f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size; add it'
            )
        cfg.auto_scale_lr.enable = True
    set_dataloader_defaults(cfg, not args.no_pin_memory, not args.no_persistent_workers)
    merge_options(cfg, args.cfg_options)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None


def prepare(args: argparse.Namespace) -> Config:
    """Make the config ready and check every file it names.

    Raises:
        FileNotFoundError: If the config, a checkpoint or a data set is missing.
        ValueError: If a flag does not fit the config.
    """
    cfg = load_config(args.config, args.work_dir, args.launcher)
    apply_flags(cfg, args)
    check_activation_checkpointing(cfg)
    fit_to_machine(cfg)
    if cfg.get('resume') and cfg.get('load_from') is None:
        cfg.load_from = find_resumable_checkpoint(cfg.work_dir)
        # Without a checkpoint to resume from, training starts at the beginning.
        cfg.resume = cfg.load_from is not None
    else:
        check_checkpoint(cfg.get('load_from'))
    for path in pretrained_files(cfg.get('model')):
        check_checkpoint(path)
    check_scales(cfg.model)
    check_data(cfg, ('train_dataloader', 'val_dataloader'))
    return cfg


def main(argv: list[str] | None = None) -> Runner:
    """Train.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        The Runner after training.
    """
    args = parse_args(argv)
    with one_line_errors('train.py'):
        cfg = prepare(args)
    runner = build_runner(cfg)
    runner.train()
    leave_process_group()
    return runner


if __name__ == '__main__':
    keep_freed_memory()
    main()
