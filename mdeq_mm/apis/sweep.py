"""Metrics by the number of evaluations of f, and how strongly f contracts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from torch import Tensor, nn

from ..deq import (
    ImplicitLayer,
    Problem,
    Solver,
    ZeroStart,
    implicit_layers,
    problem_of,
    solve,
    spectral_radius,
)


@torch.no_grad()
def sweep_evaluations(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    build_evaluator: Callable[[], Evaluator],
    counts: Sequence[int],
) -> list[dict[str, float]]:
    """Metrics of a model by the evaluations of f that its solver may spend.

    Each batch is solved once, with the largest count. After fewer evaluations a solver would return
    the best iterate so far, because its steps do not depend on how many follow. No sample stops
    early, so the numbers equal those of one test run for each ``max_iter`` at ``tol=0``.

    Args:
        model (nn.Module): A model of OpenMMLab with one implicit layer.
        loader: The batches, as ``model.test_step`` takes them.
        build_evaluator: Makes a new evaluator; called once for each count.
        counts (Sequence[int]): Evaluations of f, each at least 1.

    Returns:
        list: For each count, in ascending order, a dict of ``evaluations``, ``residual`` (relative,
            mean over the samples) and the metrics.

    Raises:
        ValueError: If the model has no implicit layer or several, or unrolls its layers.
    """
    counts = sorted(set(counts))
    layer = _the_layer(model)
    solver = _evaluating(layer, max(counts))
    snapshots = _Snapshots(solver, counts)
    evaluators = {count: build_evaluator() for count in counts}
    # The layer's own solve is as short as possible: its result is not used.
    with _watched(model, layer, solver.replace(max_iter=1), snapshots):
        for batch in loader:
            snapshots.new_batch()
            for count in counts:
                snapshots.count = count
                # A model may modify the batch it is given.
                outputs = model.test_step(deepcopy(batch))
                evaluators[count].process(data_samples=outputs, data_batch=batch)
    size = snapshots.samples
    rows = []
    for count in counts:
        metrics = {key: float(value) for key, value in evaluators[count].evaluate(size).items()}
        residual = snapshots.residual_sums[count] / max(size, 1)
        rows.append(dict(evaluations=count, residual=residual, **metrics))
    return rows


@torch.no_grad()
def spectral_radii(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    evaluations: int | None = None,
    iterations: int = 50,
) -> Tensor:
    """Spectral radius of the Jacobian of f at the equilibrium of each sample.

    Args:
        model (nn.Module): A model of OpenMMLab with one implicit layer.
        loader: The batches, as ``model.test_step`` takes them.
        evaluations (int, optional): Evaluations of f in the solve; the layer's own by default.
        iterations (int): Vector-Jacobian products of the power iteration.

    Returns:
        Tensor: (N,), one value a sample of the data set.

    Raises:
        ValueError: If the model has no implicit layer or several, or unrolls its layers.
    """
    layer = _the_layer(model)
    radii = []

    def measure(problem: Problem, out: Any) -> None:
        radii.append(spectral_radius(problem.plain(), problem.flat(out), iterations))

    with _watched(model, layer, _evaluating(layer, evaluations), measure):
        for batch in loader:
            model.test_step(deepcopy(batch))
    return torch.cat(radii)


def _the_layer(model: nn.Module) -> ImplicitLayer:
    layers = implicit_layers(model)
    if not layers:
        raise ValueError('the model has no equilibrium: no MDEQBackbone and no other ImplicitLayer')
    if len(layers) != 1:
        raise ValueError(f'the model has {len(layers)} equilibria; want exactly one')
    if layers[0].unrolled_layers:
        raise ValueError(
            f'the model unrolls {layers[0].unrolled_layers} layers and solves nothing; set '
            'unrolled_layers=0'
        )
    return layers[0]


def _evaluating(layer: ImplicitLayer, evaluations: int | None) -> Solver:
    """The solver of the layer's evaluation mode, with a fixed budget where one is given."""
    solver = layer.solver if layer.eval_solver is None else layer.eval_solver
    limits = {} if evaluations is None else dict(max_iter=evaluations, tol=0.0)
    return solver.replace(jitter=None, **limits)


@contextmanager
def _watched(
    model: nn.Module, layer: ImplicitLayer, solver: Solver, watch: Callable[[Problem, Any], Any]
) -> Iterator[None]:
    """Pass every problem of ``layer``, solved from zeros by ``solver``, to ``watch``.

    If ``watch`` returns something other than None, the layer returns that. The model is in
    evaluation mode inside the block; its mode is restored afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    kept = layer.eval_solver, layer.start
    layer.eval_solver, layer.start = solver, ZeroStart()
    handle = layer.register_forward_hook(
        lambda _, args, kwargs, out: watch(problem_of(*args, **kwargs), out), with_kwargs=True
    )
    try:
        model.eval()
        yield
    finally:
        handle.remove()
        layer.eval_solver, layer.start = kept
        for module, training in modes.items():
            module.training = training


class _Snapshots:
    """Solves a batch once and returns f of the best iterate at ``count`` evaluations."""

    def __init__(self, solver: Solver, counts: Sequence[int]) -> None:
        self.solver, self.counts, self.count = solver, counts, max(counts)
        self.kept: dict[int, Tensor] = {}
        self.residual_sums = dict.fromkeys(counts, 0.0)
        self.samples = 0

    def new_batch(self) -> None:
        """Forget the last batch."""
        self.kept = {}

    def __call__(self, problem: Problem, _: Any) -> Any:
        if not self.kept:
            watched = _BestOf(problem, self.counts)
            solve(watched, problem.start, self.solver)
            for count, (out, residual) in watched.snapshots().items():
                self.kept[count] = out
                self.residual_sums[count] += float(residual.double().sum())
            self.samples += len(residual)
        return problem.maps(self.kept[self.count])


class _BestOf:
    """Wraps f and keeps, for each count, its value at the iterate of smallest residual so far."""

    def __init__(self, f: Problem, counts: Sequence[int]) -> None:
        self.f, self.counts = f, counts
        self.calls = 0
        self.out = self.residual = torch.empty(0)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, z: Tensor) -> Tensor:
        out = self.f(z)
        norms = [torch.linalg.vector_norm(v, dim=1) for v in (out - z, out)]
        residual = norms[0] / norms[1].clamp(min=torch.finfo(out.dtype).tiny)
        residual = residual.nan_to_num(nan=float('inf'), posinf=float('inf'))
        self.calls += 1
        if self.calls == 1:
            self.out, self.residual = out, residual
        else:
            better = residual < self.residual
            self.out = torch.where(better[:, None], out, self.out)
            self.residual = torch.where(better, residual, self.residual)
        if self.calls in self.counts:
            self._kept[self.calls] = self.out, self.residual
        return out

    def snapshots(self) -> dict[int, tuple[Tensor, Tensor]]:
        """f at the best iterate and its residual, for every count."""
        # A solve that ended earlier, with every sample solved or diverged, has no better iterate
        # later.
        return {count: self._kept.get(count, (self.out, self.residual)) for count in self.counts}
