"""Suite learn: CPU time of training until a share of the test images is classified right."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from mdeq_mm.apis import build_runner, check_data, fit_to_machine, load_config
from mdeq_mm.optim import has_bfloat16

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from nets import CONFIGS, Torchdeq
from timing import Result

METRIC = 'accuracy/top1'
# Config and wanted top-1 accuracy in percent.
TASKS = dict(digits=('mdeq_tiny_digits', 97.0), cifar10_5k=('mdeq_tiny_cifar10_5k', 35.0))

# Iterations that the paper's recipe unrolls: one in 6.5, as on the whole of CIFAR-10.
UNROLLED = dict(digits=80, cifar10_5k=240)

BROYDEN = dict(type='LimitedMemoryBroyden', tol=1e-3, memory=5)
FEW = {
    'model.backbone.solver': dict(
        type='Anderson', max_iter=8, jitter=(5, 20), tol=1e-3, memory=5, _delete_=True
    ),
    'model.backbone.gradient': dict(type='JacobianFreeGradient', _delete_=True),
    'model.backbone.regularizer': dict(type='JacobianRegularizer', weight=1.0, probability=0.1),
    'default_hooks.warmup': dict(type='MDEQWarmupHook', _delete_=True),
}
# Of torchdeq's own MDEQ on CIFAR-10: 22 evaluations, 5 damped layers, no warm-up.
PUBLISHED = dict(nfe=22, solver='broyden', grad=5, tau=0.5)
NATIVE = {
    'model.backbone.norm_kernel': 'native',
    'model.backbone.regularizer': None,
    'default_hooks.warmup': dict(type='MDEQWarmupHook', _delete_=True),
}
BFLOAT16 = {'optim_wrapper.type': 'BFloat16OptimWrapper'}


def paper(unrolled: int) -> dict[str, Any]:
    """The paper's recipe, with a warm-up of so many iterations."""
    warmup = dict(unrolled_iters=unrolled, unrolled_layers=10, softplus_iters=unrolled)
    return {
        'model.backbone.solver': dict(BROYDEN, max_iter=18, _delete_=True),
        'model.backbone.gradient': dict(
            type='ImplicitGradient', solver=dict(BROYDEN, max_iter=20), _delete_=True
        ),
        'model.backbone.regularizer': None,
        'default_hooks.warmup': dict(warmup, type='MDEQWarmupHook', _delete_=True),
    }


class StopAt(Hook):
    """Ends the training at an accuracy, and counts the CPU time of the epochs until then.

    Args:
        accuracy: The wanted one, in percent.

    Attributes:
        seconds: CPU time of the training epochs so far; validation is not in it.
        reached: The last accuracy.
    """

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy
        self.seconds = self.reached = 0.0

    def before_train_epoch(self, runner: Runner) -> None:
        self._began = time.process_time()

    def after_train_epoch(self, runner: Runner) -> None:
        self.seconds += time.process_time() - self._began

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.reached = metrics[METRIC]
        if self.reached >= self.accuracy:
            runner.train_loop.stop_training = True


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train by every recipe, with as many seeds as ``--repeats`` says, on one thread."""
    torch.set_num_threads(1)
    samples: dict[str, list[float]] = {}
    missed: dict[str, list[float]] = {}
    rows = candidates(args.task)
    for seed in range(args.repeats):
        for name, (options, published) in rows.items():
            stop = train(args, seed, options, published)
            print(f'  {name}, seed {seed}: {stop.reached:.1f}% after {stop.seconds:.0f} s')
            if stop.reached >= stop.accuracy:
                samples.setdefault(name, []).append(stop.seconds)
            else:
                missed.setdefault(name, []).append(stop.reached)
    if not samples:
        raise RuntimeError(f'suite learn: no recipe reached {TASKS[args.task][1]}%: {missed}')
    base = next((name for name in samples if 'torchdeq' in name), next(iter(samples)))
    caption = f'CPU time to {TASKS[args.task][1]:g}% on {args.task}'
    result = Result.of(samples, base, caption)
    print(f'\n{result}')
    return dict(result.to_dict(), samples=samples, missed=missed)


def candidates(task: str) -> dict[str, tuple[dict[str, Any], dict[str, Any] | None]]:
    """Options of the config, and arguments of torchdeq's solver if it is to solve, by name."""
    rows: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
        'few evaluations, Jacobian-free, penalty': (FEW, None),
        "the paper's recipe": (paper(UNROLLED[task]), None),
    }
    if has_bfloat16('cpu'):
        rows['few evaluations, Jacobian-free, penalty, bf16'] = ({**FEW, **BFLOAT16}, None)
    try:
        import torchdeq  # noqa: F401
    except ImportError:
        print('  torchdeq is not installed (pip install torchdeq): left out')
    else:
        rows["torchdeq's Broyden, its recipe"] = (NATIVE, PUBLISHED)
    return rows


def train(
    args: argparse.Namespace, seed: int, options: dict[str, Any], published: dict[str, Any] | None
) -> StopAt:
    """Train the net of the task until it is good enough, or its epochs are over."""
    config, accuracy = TASKS[args.task]
    stop = StopAt(accuracy)
    with tempfile.TemporaryDirectory() as folder:
        given = dict(options, data_root=args.data_root or f'data/{args.task}')
        cfg = load_config(str(CONFIGS / f'{config}.py'), folder, options=given)
        # By default the second of its start, which the next run may share, and with it the folder.
        cfg.experiment_name = Path(folder).name
        cfg.randomness = dict(seed=seed)
        cfg.log_level = 'ERROR'
        cfg.default_hooks.checkpoint.update(interval=-1, save_best=None)
        for name in ('train_dataloader', 'val_dataloader'):
            cfg[name].update(num_workers=0, persistent_workers=False)
        fit_to_machine(cfg)
        check_data(cfg, ('train_dataloader', 'val_dataloader'), '--data-root FOLDER')
        runner = build_runner(cfg)
        if published is not None:
            runner.model.backbone = Torchdeq(runner.model.backbone, **published)
        runner.register_hook(stop)
        runner.train()
    return stop
