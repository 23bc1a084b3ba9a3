"""The draws of an iteration depend on run, rank and iteration, not on earlier draws."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine import dist
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mdeq_mm.deq import Anderson, ImplicitLayer, JacobianFreeGradient
from mdeq_mm.hooks import IterationSeedHook, seed_hook
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


def run(
    tmp_path,
    by_epoch=False,
    length=6,
    loader=(),
    hooks=(),
    val_interval=100,
    resume=False,
    shuffle=True,
):
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    model = Net()
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=2,
            dataset=Drawing(),
            sampler=dict(type=sampler, shuffle=shuffle),
            **dict(loader),
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


@pytest.mark.parametrize('epochs, workers, size', [(1, 0, 7), (3, 0, 7), (3, 2, 7), (2, 4, 3)])
def test_a_batch_is_loaded_by_a_seed_of_its_place(monkeypatch, epochs, workers, size):
    """Worker w of W loads batches w, w + W, ... of an epoch, and the next epoch's after them."""
    words = []
    monkeypatch.setattr(seed_hook, 'seed_all', lambda *given: words.append(given))
    monkeypatch.setattr(dist, 'get_rank', lambda: 5)
    started = []
    dataset = list(range(size))
    loader = DataLoader(
        dataset,
        sampler=DefaultSampler(dataset) if epochs > 1 else InfiniteSampler(dataset),
        num_workers=workers,
        collate_fn=sum,
        worker_init_fn=started.append,
    )
    seeded = seed_hook._SeededBatches(loader, 11)
    assert (loader.collate_fn, loader.worker_init_fn) == (seeded, seeded.start_worker)
    seeded.begin(100)
    for worker in range(max(workers, 1)):
        if workers:
            seeded.start_worker(worker)
        own = range(worker, size, max(workers, 1))
        places = [epoch * size + place for epoch in range(epochs) for place in own]
        assert [seeded([place, 1]) for place in places] == [place + 1 for place in places]
        # Each batch is loaded by what was seeded before it: the first by the start of the worker,
        # or by the hook, where the training process loads.
        used = words[: len(places)] if workers else words[: len(places) - 1]
        wanted = places if workers else places[1:]
        assert used == [(11, 5, 0, 100 + place) for place in wanted]
        words.clear()
    assert started == list(range(workers))
    seeded.begin(200)
    seeded._seed()
    assert words == [(11, 5, 0, 200 + seeded.worker)]
    assert seeded.__getstate__()['_loader'] is None and seeded._loader is loader


def test_a_sampler_with_a_seed_is_found_also_behind_one_of_batches():
    dataset, sampler = list(range(6)), InfiniteSampler(list(range(6)), seed=3)
    batches = BatchSampler(sampler, 2, drop_last=False)
    for loader in (
        DataLoader(dataset, sampler=sampler),
        DataLoader(dataset, batch_sampler=batches),
    ):
        assert set(seed_hook._seeded_samplers(loader)) == {sampler}
    assert not list(seed_hook._seeded_samplers(DataLoader(dataset, shuffle=True)))


def test_the_order_of_a_sampler_that_does_not_shuffle_is_kept(tmp_path):
    seen = run(tmp_path, length=4, shuffle=False)
    order = [[sample[0] for sample in batch] for batch, _ in seen]
    assert order == [[0, 1], [2, 3], [4, 5], [0, 1]]


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
