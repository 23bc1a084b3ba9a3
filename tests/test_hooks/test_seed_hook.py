"""The draws of an iteration depend on run, rank and iteration, not on earlier draws."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine import dist
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mdeq_mm.deq import Anderson, ImplicitLayer, JacobianFreeGradient
from mdeq_mm.hooks import IterationSeedHook
from mdeq_mm.hooks.seed_hook import mixed_seed


def draw():
    """One number from each generator."""
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]


class Drawing(Dataset):
    """Samples that hold their index and random numbers."""

    def __init__(self, size=6):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([index, *draw()], dtype=torch.float64))


class Net(BaseModel):
    """Keeps the samples it was given, and draws itself, training or not."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, inputs, mode='tensor'):
        drawn = draw()
        if mode != 'loss':
            return inputs
        self.seen.append((torch.stack(list(inputs)).tolist(), drawn))
        return dict(loss=self.weight.sum())


class Junk(Hook):
    """Draws wherever another hook could."""

    priority = 'VERY_LOW'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        draw()

    def before_train_epoch(self, runner):
        draw()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        draw()


def run(tmp_path, by_epoch=False, length=6, loader=(), hooks=(), val_interval=100, resume=False):
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    model = Net()
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=2, dataset=Drawing(), sampler=dict(type=sampler), **dict(loader)
        ),
        val_dataloader=dict(
            batch_size=2, dataset=Drawing(3), sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        val_evaluator=Evaluator([]),
        train_cfg=dict(
            by_epoch=by_epoch,
            val_interval=val_interval,
            **{'max_epochs' if by_epoch else 'max_iters': length},
        ),
        val_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch, interval=1),
            seed=dict(type='IterationSeedHook'),
        ),
        custom_hooks=list(hooks),
        default_scope='mmengine',
        experiment_name=f'seed_{tmp_path.parent.name}_{tmp_path.name}_{length}_{resume}',
        randomness=dict(seed=3 if not resume else None),
        log_level='ERROR',
        resume=resume,
    )
    runner.train()
    return model.seen


PERSISTENT = dict(num_workers=2, persistent_workers=True)
CASES = [
    (False, {}),
    (True, {}),
    (True, dict(num_workers=2)),
    # More processes than an epoch has batches.
    (True, dict(num_workers=4, persistent_workers=True)),
]


@pytest.mark.parametrize('loader', [{}, PERSISTENT])
def test_what_others_draw_changes_nothing(tmp_path, loader):
    expected = run(tmp_path / 'a', loader=loader)
    assert run(tmp_path / 'b', loader=loader, hooks=[Junk()], val_interval=1) == expected


@pytest.mark.parametrize('by_epoch, loader', CASES)
def test_a_resumed_run_draws_the_rest(tmp_path, by_epoch, loader):
    options = dict(by_epoch=by_epoch, loader=loader)
    half = 1 if by_epoch else 2
    expected = run(tmp_path / 'a', length=2 * half, **options)
    first = run(tmp_path / 'b', length=half, **options)
    rest = run(tmp_path / 'b', length=2 * half, resume=True, **options)
    assert first + rest == expected
    assert len(rest) == (3 if by_epoch else 2)


@pytest.mark.parametrize('loader', [{}, PERSISTENT, dict(num_workers=2)])
def test_no_number_comes_twice(tmp_path, loader):
    """MM alone gives each epoch's processes the seeds of the epoch before."""
    seen = run(tmp_path, by_epoch=True, length=3, loader=loader)
    for kind in range(3):
        numbers = [sample[1 + kind] for batch, _ in seen for sample in batch]
        numbers += [drawn[kind] for _, drawn in seen]
        assert len(set(numbers)) == len(numbers) == 3 * (6 + 3)


def test_ranks_draw_other_numbers(tmp_path, monkeypatch):
    ranks = []
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(dist, 'get_rank', lambda rank=rank: rank)
            ranks.append(run(tmp_path / str(rank)))
    for (batch, drawn), (other_batch, other_drawn) in zip(*ranks):
        assert [sample[0] for sample in batch] == [sample[0] for sample in other_batch]
        assert not set(drawn) & set(other_drawn)
        assert not {v for s in batch for v in s[1:]} & {v for s in other_batch for v in s[1:]}


def test_the_loader_gets_its_own_functions_back(tmp_path):
    kept = []

    class Keep(Hook):
        def before_run(self, runner):
            loader = runner.train_dataloader
            kept.append((loader, loader.collate_fn, loader.worker_init_fn))

    run(tmp_path, loader=PERSISTENT, length=1, hooks=[Keep()])
    ((loader, collate, init),) = kept
    assert loader.collate_fn is collate and loader.worker_init_fn is init


def test_a_checkpoint_loaded_for_its_weights_alone_says_nothing_of_the_order_of_the_data():
    checkpoint = dict(meta=dict(sampler_seed=5))
    for resume, seed in ((False, None), (True, 5)):
        hook = IterationSeedHook()
        hook.after_load_checkpoint(SimpleNamespace(_resume=resume), checkpoint)
        assert hook._sampler_seed == seed
        # One that MM's own hooks wrote.
        hook.after_load_checkpoint(SimpleNamespace(_resume=resume), dict(meta={}))
        assert hook._sampler_seed is None


class Chosen(Hook):
    """Notes what an implicit layer chooses its budget by."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.layer, self.seen = ImplicitLayer(Anderson(), JacobianFreeGradient()), []

    def before_train(self, runner):
        runner.model.layer = self.layer

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(self.layer.iteration_seed)


def test_what_a_layer_chooses_for_an_iteration_is_the_same_on_every_rank(tmp_path, monkeypatch):
    """From the seed of the first, also where each rank has a seed of its own."""

    def broadcast(values):
        values[0] = 99

    monkeypatch.setattr(dist, 'broadcast_object_list', broadcast)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, 'get_rank', lambda rank=rank: rank)
        hook = Chosen()
        run(tmp_path / str(rank), length=3, hooks=[hook])
        assert hook.layer.iteration_seed is None, 'left over after training'
        seen.append(hook.seen)
    assert seen[0] == seen[1] == [mixed_seed(99, 2, i) for i in range(3)]
    assert len(set(seen[0])) == 3
