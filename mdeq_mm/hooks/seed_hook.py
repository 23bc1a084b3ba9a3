"""Random numbers that depend on the place in the training alone, so that a resumed run has them."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, Sampler

from ..deq import ImplicitLayer, implicit_layers

# What a seed is for. The same iteration's numbers for loading and for the forward pass differ.
_LOADING, _FORWARD, _SHARED = range(3)


def mixed_seed(*words: int) -> int:
    """One seed from some integers >= 0."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def seed_all(*words: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices) from some integers >= 0."""
    seed = mixed_seed(*words)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds every iteration anew, by the run's seed, the process's rank and the iteration.

    MM saves no generator's state: after ``--resume`` dropout masks and augmentations would be
    those of the first iterations again, and with ``randomness.seed=None`` the data would come in
    another order. Under this hook what is drawn at an iteration does not depend on what was drawn
    before it, so an interrupted and resumed run ends with the weights of one that was never
    interrupted, where the arithmetic itself is deterministic. That holds for augmentation inside
    loader processes too, as long as ``num_workers`` and the number of processes stay the same.
    Validation does not shift the numbers of the training. Ranks draw different masks; what an
    implicit layer chooses for a whole iteration (``iteration_seed``) is the same on all ranks.

    Checkpoints carry the sampler's seed as ``meta.sampler_seed``. A checkpoint in the middle of an
    epoch of an epoch-based loop is no such place: MM starts that epoch again.
    """

    # What other hooks draw does not reach the model.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._sampler_seed: int | None = None
        self._batches: _SeededBatches | None = None
        self._layers: list[ImplicitLayer] = []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        for sampler in _seeded_samplers(runner.train_dataloader):
            checkpoint['meta']['sampler_seed'] = int(sampler.seed)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # As MM's own hooks do: weights alone may be loaded for a new training.
        if runner._resume:
            self._sampler_seed = checkpoint['meta'].get('sampler_seed')

    def before_train(self, runner: Runner) -> None:
        loader = runner.train_dataloader
        if self._sampler_seed is not None:
            for sampler in _seeded_samplers(loader):
                sampler.seed = self._sampler_seed
        # Otherwise each iterator made of the loader takes a number of the global generator.
        loader.generator = torch.Generator().manual_seed(runner.seed)
        self._batches = _SeededBatches(loader, runner.seed)
        self._layers = implicit_layers(runner.model)
        # With diff_rank_seed each rank has a seed of its own.
        shared = [runner.seed]
        dist.broadcast_object_list(shared)
        self._shared_seed = shared[0]

    def before_train_epoch(self, runner: Runner) -> None:
        self._batches.begin(0 if _skips_by_loading(runner) else runner.iter)
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            _renew_iterator(runner.train_loop)
        self._seed(runner, _LOADING, runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._seed(runner, _FORWARD, runner.iter)
        for layer in self._layers:
            layer.iteration_seed = mixed_seed(self._shared_seed, _SHARED, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        self._seed(runner, _LOADING, runner.iter + 1)

    def after_val(self, runner: Runner) -> None:
        self._seed(runner, _LOADING, runner.iter)

    def after_train(self, runner: Runner) -> None:
        self._batches.remove()
        self._batches = None
        for layer in self._layers:
            layer.iteration_seed = None
        self._layers = []

    @staticmethod
    def _seed(runner: Runner, purpose: int, iteration: int) -> None:
        seed_all(runner.seed, dist.get_rank(), purpose, iteration)


def _seeded_samplers(loader: DataLoader) -> Iterator[Sampler]:
    """Samplers of a loader that shuffle by a seed of their own."""
    for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
        if getattr(sampler, 'seed', None) is not None:
            yield sampler


def _skips_by_loading(runner: Runner) -> bool:
    """Whether a resumed loop loads the batches of before once more and drops them."""
    return isinstance(runner.train_loop, IterBasedTrainLoop) and not hasattr(
        runner.train_dataloader.sampler, 'skip'
    )


def _renew_iterator(loop: IterBasedTrainLoop) -> None:
    """Make the iterator of a loop anew, from the first batch on.

    Upstream makes it with the loop, before any hook: its processes have loaded already, under other
    seeds and in the order of another sampler's seed.
    """
    loader = loop.dataloader
    for sampler in _seeded_samplers(loader):
        if isinstance(sampler, InfiniteSampler):
            # It goes on where it was left, whoever iterates.
            fresh = InfiniteSampler(sampler.dataset, shuffle=sampler.shuffle, seed=sampler.seed)
            sampler.indices = fresh.indices
    # Where its processes persist, a loader keeps them with its iterator.
    loader._iterator = None
    loop.dataloader_iterator = type(loop.dataloader_iterator)(loader)


class _SeededBatches:
    """Seeds a loader before each batch, by the batch's place in the training.

    Stands in for the loader's ``collate_fn``, which a process calls once a batch, and for its
    ``worker_init_fn``. Of the batches of an iterator, process w of W makes number w, W + w, ...
    A loader without any works in the training's own process. The hook seeds that as well, but not
    between batches that MM loads to skip them.

    Args:
        loader: The loader whose functions it takes over.
        seed: The run's seed.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        self.collate: Callable = loader.collate_fn
        self.init: Callable | None = loader.worker_init_fn
        self.seed, self.rank = seed, dist.get_rank()
        self.num_workers = max(loader.num_workers, 1)
        # An infinite sampler never starts a second round.
        infinite = isinstance(loader.sampler, InfiniteSampler)
        self.per_epoch = None if infinite else len(loader)
        self.start = self.worker = self.count = 0
        self._loader = loader
        loader.collate_fn, loader.worker_init_fn = self, self.start_worker

    def begin(self, start: int) -> None:
        """Say at which iteration the next iterator of the loader begins."""
        self.start, self.count = start, 0

    def remove(self) -> None:
        """Give the loader its own functions back."""
        self._loader.collate_fn, self._loader.worker_init_fn = self.collate, self.init

    def start_worker(self, worker: int) -> None:
        """Runs in a new process."""
        if self.init is not None:
            self.init(worker)
        self.worker, self.count = worker, 0
        self._seed()

    def __call__(self, samples: list) -> Any:
        batch = self.collate(samples)
        self.count += 1
        self._seed()
        return batch

    def _seed(self) -> None:
        epoch, index = 0, self.count
        if self.per_epoch is not None:
            # Processes that persist go on with the next epoch. One may have no batch at all.
            own = len(range(self.worker, self.per_epoch, self.num_workers))
            epoch, index = divmod(self.count, max(own, 1))
        place = epoch * (self.per_epoch or 0) + index * self.num_workers + self.worker
        seed_all(self.seed, self.rank, _LOADING, self.start + place)

    def __getstate__(self) -> dict:
        # A loader cannot be sent to another process, and is not wanted there.
        return {**self.__dict__, '_loader': None}
