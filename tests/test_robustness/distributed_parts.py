"""What the processes of test_distributed.py run: parts for configs, and the work of a pair."""

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import torch.nn.functional as F
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from mdeq_mm.deq import implicit_layers
from mdeq_mm.hooks import IterationSeedHook, MDEQWarmupHook, SolverStatsHook
from mdeq_mm.layers import VariationalDropout2d, reset_masks
from mdeq_mm.models import MDEQCell

from .. import plain_dump  # noqa: F401
from . import contracting, tiny_backbone
from .test_sharded import WRAPPERS, make, step

ANDERSON = dict(type='Anderson', max_iter=40, tol=1e-4)
GRADIENTS = dict(
    ImplicitGradient=dict(type='ImplicitGradient', solver=ANDERSON),
    TruncatedGradient=dict(type='TruncatedGradient', steps=2),
    JacobianFreeGradient=dict(type='JacobianFreeGradient'),
    SharedInverseGradient=dict(type='SharedInverseGradient', steps=1),
    PhantomGradient=dict(type='PhantomGradient', steps=2),
)


@MODELS.register_module()
def in_float64(model: dict, **shared: Any) -> nn.Module:
    """A model in double precision, where a difference is an error and not rounding."""
    return MODELS.build(dict(model, **shared)).double()


@HOOKS.register_module()
class RecordHook(Hook):
    """Keeps what a process's training did and writes it to its work_dir as ``rank*.pt``.

    Attributes:
        record: Loss and mean forward NFE of this process's samples at each iteration, gradients
            of each step, the weights at the end, and whether the model was wrapped.
    """

    def before_train(self, runner: Runner) -> None:
        self.record: Dict[str, Any] = dict(losses=[], nfe=[], grads=[])
        self.record['wrapped'] = isinstance(runner.model, MMDistributedDataParallel)
        named = list(runner.model.named_parameters())

        def keep(*_) -> None:
            grads = {key.removeprefix('module.'): p.grad.clone() for key, p in named}
            self.record['grads'].append(grads)

        runner.optim_wrapper.optimizer.register_step_pre_hook(keep)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: Optional[dict] = None
    ) -> None:
        self.record['losses'].append(float(outputs['loss']))
        (layer,) = implicit_layers(runner.model)
        stats = layer.forward_stats
        self.record['nfe'].append(stats and float(stats.num_iter.double().mean()))

    def after_train(self, runner: Runner) -> None:
        weights = runner.model.state_dict().items()
        self.record['weights'] = {key.removeprefix('module.'): value for key, value in weights}
        torch.save(self.record, Path(runner.work_dir) / f'rank{dist.get_rank()}.pt')


class ProbeHook(Hook):
    """Watches f in every iteration of a process."""

    priority = 'VERY_LOW'

    def before_train(self, runner: Runner) -> None:
        self.seen: List[Dict[str, Any]] = []
        self.grads: List[Dict[str, Tensor]] = []
        self.current: Dict[str, Any] = {}
        self.net = runner.model.module.backbone
        self.net.cell.register_forward_hook(self._count)
        for index, drop in enumerate(self._dropouts()):
            drop.register_forward_hook(lambda drop, x, _, i=index: self._look(i, drop.mask(*x)))
        named = list(runner.model.module.named_parameters())
        runner.optim_wrapper.optimizer.register_step_pre_hook(
            lambda *_: self.grads.append({key: p.grad.clone() for key, p in named})
        )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self.current = dict(calls=0, masks=[[] for _ in self._dropouts()])

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: Optional[dict] = None
    ) -> None:
        masks = self.current['masks']
        self.current['constant'] = all(torch.equal(m, s[0]) for s in masks for m in s)
        self.current['masks'] = [seen[0] for seen in masks]
        for name in ('forward', 'backward'):
            stats = getattr(self.net.implicit, f'{name}_stats')
            if stats is not None:
                self.current[name] = dict(stats.summary(), longest=int(stats.num_iter.max()))
        scalars = runner.message_hub.log_scalars.items()
        self.current['logged'] = {
            key.removeprefix('train/train/'): float(value.current())
            for key, value in scalars
            if key.startswith('train/train/deq_')
        }
        self.seen.append(self.current)

    def _dropouts(self) -> List[VariationalDropout2d]:
        return [m for m in self.net.modules() if isinstance(m, VariationalDropout2d)]

    def _count(self, *_) -> None:
        self.current['calls'] += 1

    def _look(self, index: int, mask: Tensor) -> None:
        self.current['masks'][index].append(mask.clone())


class TinyNet(BaseModel):
    """An MDEQ of two scales whose f contracts, and a linear classifier on the lower one."""

    def __init__(self, gradient: dict) -> None:
        super().__init__()
        self.backbone = tiny_backbone(solver=ANDERSON, gradient=gradient, drop_rate=0.3)
        self.head = nn.Linear(16, 3)

    def init_weights(self) -> None:
        # How often mmengine draws before depends on its version.
        torch.manual_seed(0)
        super().init_weights()
        contracting(self.backbone)

    def forward(self, images: Tensor, labels: Tensor, mode: str = 'tensor'):
        out = self.head(self.backbone(images)[-1].mean((2, 3)))
        return dict(loss=F.cross_entropy(out, labels)) if mode == 'loss' else out


def samples_of(rank: int) -> list:
    """Noise; every second image of the first process is so faint that its solve takes long."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    if rank == 0:
        images[::2] *= 0.01
    return list(zip(images, torch.randint(3, (8,), generator=generator)))


def train(rank: int, gradient: str) -> Dict[str, Any]:
    """Four iterations: two unrolled, the first of them smooth, then two at equilibrium."""
    torch.manual_seed(0)
    net = MMDistributedDataParallel(
        TinyNet(GRADIENTS[gradient]), broadcast_buffers=False, find_unused_parameters=False
    )
    probe = ProbeHook()
    # DefaultSampler deals the data set out to the processes in turn.
    pairs = zip(samples_of(0), samples_of(1))
    runner = Runner(
        model=net,
        work_dir='.',
        train_dataloader=dict(
            batch_size=2,
            dataset=[sample for pair in pairs for sample in pair],
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(checkpoint=None, logger=None, timer=None),
        custom_hooks=[
            IterationSeedHook(),
            MDEQWarmupHook(unrolled_iters=2, unrolled_layers=3, softplus_iters=1),
            SolverStatsHook(interval=1),
            probe,
        ],
        launcher='pytorch',
        randomness=dict(seed=0),
        log_level='ERROR',
        experiment_name=f'{gradient}_{rank}',
    )
    runner.train()
    buffers = dict(net.module.named_buffers())
    weights = {key: value.detach() for key, value in net.module.named_parameters()}
    result = dict(seen=probe.seen, grads=probe.grads, weights=weights)
    result['running_mean'] = buffers['backbone.stem.0.bn.running_mean']
    result['runner'] = runner
    return result


def uneven_reports(rank: int, runner: Runner) -> Dict[str, Dict[str, float]]:
    """What the stats hook logs where only the first process has something to report."""
    hook, hub = SolverStatsHook(interval=1), runner.message_hub
    implicit = implicit_layers(runner.model)[0]
    own = implicit.forward_stats.summary(), implicit.backward_stats.summary()
    if rank == 0:
        hook.after_val_iter(runner, 0)
        hook.after_val_iter(runner, 1)
    hook.after_val_epoch(runner)
    if rank == 1:
        implicit._reports.backward = None
    hook.after_train_iter(runner, 0)
    names = ('val/val/deq_nfe', 'train/train/deq_nfe', 'train/train/deq_bwd_nfe')
    logged = {name: float(hub.get_scalar(name).current()) for name in names}
    return dict(own=dict(zip(('forward', 'backward'), own)), logged=logged)


def masks_of_one_seed() -> Tensor:
    """Masks drawn after both processes were given the same seed."""
    torch.manual_seed(0)
    drop = VariationalDropout2d(0.5).train()
    ones = torch.ones(4, 32, 1, 1)
    first = drop(ones)
    reset_masks(drop)
    return torch.stack([first, drop(ones)])


def sharded_steps() -> Dict[str, Dict[str, Tensor]]:
    """All weights after one step on the same images, by each way to shard a net whose f is a part
    of its own."""
    return {
        name: step(wrap(make('Anderson', GRADIENTS['ImplicitGradient'], 0.0), (MDEQCell,), False))[
            1
        ]
        for name, wrap in WRAPPERS.items()
    }


def work() -> None:
    """All a pair of processes is asked to do; the results are in ``pair*.pt``.

    A part that raises has its traceback there, and the ones after it say so.
    """
    rank = int(os.environ['RANK'])
    # A process that waits for the other in vain says so.
    torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=60))
    parts: Dict[str, Callable[[], Any]] = {
        name: lambda name=name: train(rank, name) for name in GRADIENTS
    }
    parts['masks'] = lambda: dict(drawn=masks_of_one_seed())
    parts['sharded'] = sharded_steps
    parts['uneven'] = lambda: uneven_reports(rank, results['ImplicitGradient']['runner'])
    results: Dict[str, Any] = {}
    failed = None
    for name, part in parts.items():
        if failed is not None:
            # The processes may no longer be at one place, and would wait for each other.
            results[name] = dict(error=f'not tried, because {failed} failed')
            continue
        try:
            results[name] = part()
        except Exception:
            results[name], failed = dict(error=traceback.format_exc()), name
    for result in results.values():
        result.pop('runner', None)
    torch.save(results, f'pair{rank}.pt')
    torch.distributed.destroy_process_group()
