"""Reports what the solver did where MM users look: log, scalars.json, TensorBoard, WandB."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..deq import (
    ImplicitLayer,
    SolverStats,
    Status,
    implicit_layers,
    problem_of,
    spectral_radius,
)
from ..options import check_int, check_number, checks_options

_FIELDS = ('nfe', 'residual', 'converged', 'failed')

_UNCONVERGED = dict(
    forward=Status.EXHAUSTED.remedy,
    backward='the gradient is that of its best iterate and may be far from the exact one. Raise '
    'model.backbone.gradient.solver.max_iter, or use PhantomGradient or TruncatedGradient, which '
    'solve nothing.',
)


@HOOKS.register_module()
@checks_options
class SolverStatsHook(Hook):
    """Logs evaluations of f, residual and convergence, and warns when the solver has trouble.

    Scalars, each a mean over the batch and over processes: ``train/deq_nfe``,
    ``train/deq_residual`` (relative, at the returned iterate), ``train/deq_converged`` (share of
    samples that reached tol), ``train/deq_failed`` (samples that diverged or turned non-finite),
    and the same of the backward solve as ``train/deq_bwd_*``, every ``interval`` iterations. Under
    ``val/`` and ``test/`` are the forward ones, as means over the data set. Iterations of an
    unrolled net log none.

    Args:
        interval (int): Iterations between reports while training; each waits for the device.
        warn_residual (float): A mean residual above this in ``patience`` consecutive reports, of
            the forward or of the backward solve, causes a warning.
        patience (int): Number of reports before that warning.
        spectral_radius (dict, optional): Log the spectral radius of the Jacobian of f at the
            equilibria of validation and testing as well, ``val/deq_spectral_radius``:
            ``dict(interval=10, iterations=50)`` measures every tenth batch by 50 vector-Jacobian
            products.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        interval: int = 10,
        warn_residual: float = 0.1,
        patience: int = 20,
        spectral_radius: dict[str, int] | None = None,
    ) -> None:
        name = type(self).__name__
        self.interval = check_int(name, 'interval', interval, 1)
        self.warn_residual = check_number(name, 'warn_residual', warn_residual, 0)
        self.patience = check_int(name, 'patience', patience, 1)
        self._radius = None if spectral_radius is None else _Radius(**spectral_radius)
        self._unconverged = dict(forward=0, backward=0)
        self._warned = set()
        self._evaluation: list[dict[str, float]] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        if not self.every_n_train_iters(runner, self.interval):
            return
        scalars = self._collect(runner, ('forward', 'backward'))
        _log(runner, 'train', scalars)
        self._watch(runner, scalars, outputs or {})

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: Sequence | None = None
    ) -> None:
        self._evaluation.append(self._collect(runner, ('forward',), reduce=False))

    after_test_iter = after_val_iter

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        if self._radius is not None:
            self._radius.watch(runner.model, batch_idx)

    before_test_iter = before_val_iter

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._report_evaluation(runner, 'val')

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._report_evaluation(runner, 'test')

    def _report_evaluation(self, runner: Runner, mode: str) -> None:
        reports = [report for report in self._evaluation if report]
        self._evaluation = []
        names = [f'deq_{field}' for field in _FIELDS]
        # Every process takes part in the mean, even if it has no share of the data set.
        sums = [float(sum(report[name] for report in reports)) for name in names]
        *sums, count = _mean_over_processes(torch.tensor([*sums, float(len(reports))]))
        if count:
            _log(runner, mode, {name: total / count for name, total in zip(names, sums)})
        if self._radius is not None:
            total, count = _mean_over_processes(torch.tensor(self._radius.take()))
            if count:
                _log(runner, mode, dict(deq_spectral_radius=total / count))

    def _collect(
        self, runner: Runner, passes: Sequence[str], reduce: bool = True
    ) -> dict[str, float]:
        """``deq_*`` scalars of the last iteration, over all implicit layers of the model."""
        # One row per pass; the last column says whether this process has such a solve. Processes
        # without one still take part in the mean, else the others would wait forever.
        table = torch.zeros(len(passes), len(_FIELDS) + 1)
        for row, name in zip(table, passes):
            found: list[SolverStats] = [
                stats
                for layer in implicit_layers(runner.model)
                if (stats := getattr(layer, f'{name}_stats')) is not None
            ]
            if found:
                # One summary each, because every summary waits for the device.
                summaries = [stats.summary() for stats in found]
                values = [[summary[field] for field in _FIELDS] for summary in summaries]
                row[:-1], row[-1] = torch.tensor(values).mean(0), 1
        scalars = {}
        rows = _mean_over_processes(table) if reduce else table.tolist()
        for name, (*means, share) in zip(passes, rows):
            prefix = 'deq_' if name == 'forward' else 'deq_bwd_'
            if share:
                pairs = zip(_FIELDS, means)
                scalars.update({f'{prefix}{field}': mean / share for field, mean in pairs})
        return scalars

    def _watch(self, runner: Runner, scalars: dict[str, float], outputs: dict) -> None:
        """Warn, once for each kind of trouble."""
        for prefix, name in (('deq_', 'forward'), ('deq_bwd_', 'backward')):
            residual = scalars.get(f'{prefix}residual', 0.0)
            above = residual > self.warn_residual
            self._unconverged[name] = self._unconverged[name] + 1 if above else 0
            if self._unconverged[name] >= self.patience:
                self._warn(
                    runner,
                    f'{name} unconverged',
                    f'The {name} solver ended at a mean relative residual above '
                    f'{self.warn_residual:g} for {self.patience} reports in a row (now '
                    f'{residual:.3g} after {scalars[f"{prefix}nfe"]:.1f} evaluations): '
                    f'{_UNCONVERGED[name]}',
                )
            failed = scalars.get(f'{prefix}failed', 0.0)
            if failed:
                self._warn(
                    runner,
                    f'{name} failed',
                    f'The {name} solver diverged or turned non-finite on {failed:g} samples of '
                    f'the batch, and their best iterates were used: {Status.DIVERGED.remedy}',
                )
        loss = outputs.get('loss')
        if loss is not None and not bool(torch.isfinite(torch.as_tensor(loss)).all()):
            solver_failed = scalars.get('deq_failed', 0.0) > 0
            reason = (
                'the solver failed as well: ' + Status.NON_FINITE.remedy
                if solver_failed
                else 'the equilibrium is finite, so the cause is in head, labels or loss scale.'
            )
            self._warn(runner, 'loss', f'The loss is not finite; {reason}')

    def _warn(self, runner: Runner, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            runner.logger.warning(message)


class _Radius:
    """Spectral radii at the equilibria of an evaluation, measured in a forward hook of the layers.

    Args:
        interval (int): Batches between two measurements.
        iterations (int): Vector-Jacobian products per measurement.
    """

    def __init__(self, interval: int = 10, iterations: int = 50) -> None:
        name = 'SolverStatsHook.spectral_radius'
        self.interval = check_int(name, 'interval', interval, 1)
        self.iterations = check_int(name, 'iterations', iterations, 2)
        self._handles: list[Any] = []
        self._sum = self._count = 0.0

    def watch(self, model: nn.Module, batch_idx: int) -> None:
        """Measure in the following batch, if its turn has come."""
        self._remove()
        if batch_idx % self.interval == 0:
            layers = implicit_layers(model)
            self._handles = [
                layer.register_forward_hook(self._measure, with_kwargs=True) for layer in layers
            ]

    def take(self) -> list[float]:
        """Sum and number of the radii since the last call."""
        self._remove()
        taken, self._sum, self._count = [self._sum, self._count], 0.0, 0.0
        return taken

    def _measure(self, layer: ImplicitLayer, args: tuple, kwargs: dict, out: Any) -> None:
        problem = problem_of(*args, **kwargs)
        radii = spectral_radius(problem.plain(), problem.flat(out), self.iterations)
        self._sum += radii.sum().item()
        self._count += len(radii)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _log(runner: Runner, mode: str, scalars: dict[str, float]) -> None:
    """Make scalars appear as ``mode/name``, so that training and evaluation are separate curves.

    MM strips ``mode/`` from a name once before it shows it, which would merge the two.
    """
    for name, value in scalars.items():
        runner.message_hub.update_scalar(f'{mode}/{mode}/{name}', value)


def _mean_over_processes(values: Tensor) -> list[float]:
    """Elementwise mean of a CPU tensor over the processes of a run."""
    if dist.is_distributed():
        values = values.to(dist.get_comm_device())
        dist.all_reduce(values, 'mean')
    return values.tolist()
