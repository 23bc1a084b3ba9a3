"""Random numbers that depend only on the position in training, so a resumed run repeats them."""

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

# Purposes of a seed: loading and the forward pass of one iteration use different numbers.
_LOADING, _FORWARD, _SHARED = range(3)


def mixed_seed(*words: int) -> int:
    """One seed from several integers >= 0."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def seed_all(*words: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices) from several integers >= 0."""
    seed = mixed_seed(*words)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds every iteration from the run's seed, the process's rank and the iteration.

    MM saves no generator state: after ``--resume``, dropout masks and augmentations would repeat
    those of the first iterations, and with ``randomness.seed=None`` the data would come in another
    order. With this hook, the numbers drawn at an iteration do not depend on earlier draws. An
    interrupted and resumed run therefore ends with the weights of an uninterrupted one, if the
    arithmetic is deterministic. This includes augmentation in worker processes, as long as
    ``num_workers`` and the number of processes stay the same. Validation does not shift the random
    numbers of training. Ranks draw different masks; what an implicit layer chooses for a whole
    iteration (``iteration_seed``) is the same on all ranks.

    Checkpoints store the sampler's seed as ``meta.sampler_seed``. An epoch-based loop cannot resume
    in the middle of an epoch: MM starts that epoch again.
    """

    # Draws of other hooks do not affect the model.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._sampler_seed: int | None = None
        self._batches: _SeededBatches | None = None
        self._layers: list[ImplicitLayer] = []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        for sampler in _seeded_samplers(runner.train_dataloader):
            checkpoint['meta']['sampler_seed'] = int(sampler.seed)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # As in MM's own hooks: a checkpoint may be loaded only for its weights.
        if runner._resume:
            self._sampler_seed = checkpoint['meta'].get('sampler_seed')

    def before_train(self, runner: Runner) -> None:
        loader = runner.train_dataloader
        if self._sampler_seed is not None:
            for sampler in _seeded_samplers(loader):
                sampler.seed = self._sampler_seed
        # Otherwise each new iterator of the loader draws from the global generator.
        loader.generator = torch.Generator().manual_seed(runner.seed)
        self._batches = _SeededBatches(loader, runner.seed)
        self._layers = implicit_layers(runner.model)
        # With diff_rank_seed each rank has its own seed.
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
    """Samplers of a loader that shuffle with their own seed."""
    for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
        if getattr(sampler, 'seed', None) is not None:
            yield sampler


def _skips_by_loading(runner: Runner) -> bool:
    """Whether a resumed loop loads the earlier batches again and drops them."""
    return isinstance(runner.train_loop, IterBasedTrainLoop) and not hasattr(
        runner.train_dataloader.sampler, 'skip'
    )


def _renew_iterator(loop: IterBasedTrainLoop) -> None:
    """Recreate the iterator of a loop, from the first batch on.

    Upstream creates it with the loop, before any hook runs. Its workers have already loaded
    batches, with other seeds and in the order of another sampler seed.
    """
    loader = loop.dataloader
    for sampler in _seeded_samplers(loader):
        if isinstance(sampler, InfiniteSampler):
            # It continues where it stopped, whoever iterates.
            fresh = InfiniteSampler(sampler.dataset, shuffle=sampler.shuffle, seed=sampler.seed)
            sampler.indices = fresh.indices
    # A loader with persistent workers keeps them in its iterator.
    loader._iterator = None
    loop.dataloader_iterator = type(loop.dataloader_iterator)(loader)


class _SeededBatches:
    """Seeds a loader before each batch, by the batch's position in training.

    Replaces the loader's ``collate_fn``, which a worker calls once per batch, and its
    ``worker_init_fn``. Worker w of W loads batches w, W + w, ... of an iterator. A loader without
    workers runs in the training process. The hook seeds that process as well, but not between
    batches that MM loads only to skip them.

    Args:
        loader: The loader whose functions it replaces.
        seed: The run's seed.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        self.collate: Callable = loader.collate_fn
        self.init: Callable | None = loader.worker_init_fn
        self.seed, self.rank = seed, dist.get_rank()
        self.num_workers = max(loader.num_workers, 1)
        # An infinite sampler never starts a second epoch.
        infinite = isinstance(loader.sampler, InfiniteSampler)
        self.per_epoch = None if infinite else len(loader)
        self.start = self.worker = self.count = 0
        self._loader = loader
        loader.collate_fn, loader.worker_init_fn = self, self.start_worker

    def begin(self, start: int) -> None:
        """Set the iteration at which the loader's next iterator begins."""
        self.start, self.count = start, 0

    def remove(self) -> None:
        """Restore the loader's own functions."""
        self._loader.collate_fn, self._loader.worker_init_fn = self.collate, self.init

    def start_worker(self, worker: int) -> None:
        """Called in a new worker."""
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
            # Persistent workers continue with the next epoch. A worker may have no batch at all.
            own = len(range(self.worker, self.per_epoch, self.num_workers))
            epoch, index = divmod(self.count, max(own, 1))
        place = epoch * (self.per_epoch or 0) + index * self.num_workers + self.worker
        seed_all(self.seed, self.rank, _LOADING, self.start + place)

    def __getstate__(self) -> dict:
        # A loader cannot be pickled, and the workers do not need it.
        return {**self.__dict__, '_loader': None}
