"""The one loop every solver runs in: residuals, stopping, best iterate, guards."""

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...options import check_int, check_number, immutable
from .products import at_least_float32, products_for, recording

Function = Callable[[Tensor], Tensor]


class Status(enum.IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    EXHAUSTED = 1
    DIVERGED = 2
    NON_FINITE = 3

    @property
    def remedy(self) -> str:
        """What the status means and what a user can do about it."""
        return _REMEDIES[self]


_REMEDIES: dict[Status, str] = {
    Status.CONVERGED: 'the residual reached tol.',
    Status.EXHAUSTED: 'max_iter evaluations of f did not bring the residual to tol; the best '
    'iterate was returned. Raise max_iter, raise tol, or train longer with an unrolled warm-up.',
    Status.DIVERGED: 'the residual exploded and the best earlier iterate was returned. Lower the '
    'learning rate, add weight decay, or use Anderson or a damped FixedPointIteration.',
    Status.NON_FINITE: 'f returned nan or inf and the best finite iterate was returned. Look for '
    'nan in the input and the weights; under fp16, keep f in bf16 or float32.',
}

# A sample has diverged when |f(z) - z| is this many times |f(z)| and this many times its own
# first value. Either alone also happens on the way to a solution: f(z) may pass through zero, and
# a start may lie close to a repelling fixed point.
_EXPLODED = 1e4


@dataclass
class Solution:
    """What :func:`solve` found, per sample of the batch.

    Attributes:
        z: (N, D) the iterate of smallest residual.
        residual: (N,) its relative residual ``|f(z) - z| / |f(z)|``.
        num_iter: (N,) evaluations of f spent on the sample.
        trace: (T, N) relative residual after each of the T evaluations; a frozen sample
            repeats its last value.
        status: (N,) :class:`Status` codes.
        state: the solver's final state, if it was asked for (``keep_state``).
    """

    z: Tensor
    residual: Tensor
    num_iter: Tensor
    trace: Tensor
    status: Tensor
    state: Any = None


class Part:
    """Base of solvers, gradients, starts and regularizers: hyperparameters that never change.

    State that a forward pass builds up lives in separate objects, so one part can serve many
    layers, passes and threads at once.
    """

    def replace(self, **changes: Any) -> Any:
        """A copy with some options changed; the options are checked again."""
        return replace(self, **changes)


@immutable
class Solver(Part):
    """A method for z = f(z).

    A method implements :meth:`init` and :meth:`step`; :func:`solve` does the rest.

    Args:
        max_iter (int): Evaluations of f allowed, the same count for every method.
        tol (float): Relative residual at which a sample counts as solved. 0 never stops early.
        check_every (int): Evaluations between two checks of whether all samples are done. On a GPU
            each check waits for the device. With ``tol=0`` there is none.
        jitter (tuple[int, int], optional): ``(low, high)``. In training, each forward pass draws
            its budget between the two, half of the time at most ``max_iter`` and half of the time
            more, so that f does not adapt to one number of evaluations. All processes draw the
            same.
    """

    max_iter: int = 30
    tol: float = 1e-3
    check_every: int = field(default=1, kw_only=True)
    jitter: tuple[int, int] | None = field(default=None, kw_only=True)

    #: Whether the final state has ``inverse_transpose``, an estimate of the inverse Jacobian.
    learns_jacobian = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_int(name, 'max_iter', self.max_iter, minimum=1)
        check_number(name, 'tol', self.tol, low=0)
        check_int(name, 'check_every', self.check_every, minimum=1)
        if self.jitter is not None:
            _check_jitter(name, self.jitter, self.max_iter)

    def drawn(self, generator: torch.Generator | None = None) -> 'Solver':
        """The solver of one training pass, with ``max_iter`` drawn according to ``jitter``."""
        if self.jitter is None:
            return self
        (low, high), middle = self.jitter, self.max_iter
        side, place = torch.rand(2, generator=generator, device='cpu').tolist()
        if side < 0.5 or high == middle:
            high = middle
        else:
            low = middle + 1
        max_iter = min(high, low + int(place * (high - low + 1)))
        return self.replace(max_iter=max_iter, jitter=None)

    def init(self, z0: Tensor) -> Any:
        """The state of a solve that starts at ``z0`` (N, D)."""
        raise NotImplementedError

    def resume(self, state: Any, z0: Tensor) -> Any:
        """As :meth:`init`, for a solve that goes on with what ``state`` learned of the Jacobian.

        Args:
            state: The last state of another solve by this solver, which may be changed.
            z0 (Tensor): (N, D), like that solve's.
        """
        return self.init(z0)

    def step(self, state: Any, g: Tensor, last_step: Tensor | None) -> Tensor:
        """The next displacement of the iterate.

        Args:
            state: What :meth:`init` returned; updated in place.
            g (Tensor): (N, D) the function value ``f(z) - z`` at the current iterate. The solver
                may keep it until the next step but must not change it.
            last_step (Tensor): (N, D) the displacement that led to the current iterate, zero
                for a sample that is frozen. None at the first step.

        Returns:
            Tensor: (N, D) what to add to the current iterate. It may be a buffer of the state,
                valid until the next call.
        """
        raise NotImplementedError

    def select(self, state: Any, rows: Tensor) -> Any:
        """A copy of the state for a subset of the rows.

        A state is None or a dataclass; its tensors have a row for each sample.
        """
        if state is None:
            return None
        return with_tensors(state, lambda tensor: tensor[rows])


def with_tensors(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a solver's state with ``function`` of each of its tensors."""
    tensors = {name: value for name, value in vars(state).items() if isinstance(value, Tensor)}
    return replace(state, **{name: function(tensor) for name, tensor in tensors.items()})


def _check_jitter(name: str, jitter: Any, max_iter: int) -> None:
    pair = isinstance(jitter, tuple) and len(jitter) == 2
    if not pair or not all(isinstance(n, int) and not isinstance(n, bool) for n in jitter):
        raise ValueError(f'{name}: jitter must be two integers (low, high), got {jitter!r}.')
    if not 1 <= jitter[0] <= max_iter <= jitter[1]:
        raise ValueError(
            f'{name}: jitter={jitter} must hold max_iter={max_iter} between its two ends, both at '
            'least 1. Change both, or set eval_solver=dict(max_iter=...) for evaluation alone.'
        )


@dataclass
class _Outcome:
    """The result of one evaluation for the batch.

    ``all_improved`` and ``num_active`` are None if the host does not know them.
    """

    improved: Tensor
    all_improved: bool | None = None
    num_active: int | None = None


# Attributes of a record with one row a sample.
_PER_ROW = ('best', 'residual', 'num_iter', 'status', 'active')


class _Record:
    """Per-sample bookkeeping of one solve: what is best, what is active, how it ended."""

    def __init__(self, z0: Tensor, solver: Solver) -> None:
        n = z0.shape[0]
        self.solver = solver
        # A graph cannot branch on values, and a fixed budget on a GPU has nothing to decide: there,
        # masks alone freeze samples.
        self.asks = not recording() and (solver.tol > 0 or z0.device.type == 'cpu')
        self.best = z0
        self.residual = z0.new_full((n,), float('inf'), dtype=at_least_float32(z0.dtype))
        self.num_iter = torch.zeros(n, dtype=torch.long, device=z0.device)
        self.status = torch.full_like(self.num_iter, int(Status.EXHAUSTED))
        self.active = torch.ones(n, dtype=torch.bool, device=z0.device)
        self.limit: Tensor | None = None
        self.trace: list[Tensor] = []

    def select(self, rows: Tensor) -> '_Record':
        """A record of a subset of the rows, which continues from here."""
        part = copy(self)
        for name in (*_PER_ROW, 'limit'):
            setattr(part, name, getattr(self, name)[rows])
        part.trace = [residual[rows] for residual in self.trace]
        return part

    def merge(self, rows: Tensor, part: '_Record') -> None:
        """Merge in the results of a subset of the rows."""
        for residual in part.trace[len(self.trace) :]:
            self.trace.append(self.trace[-1].index_copy(0, rows, residual))
        for name in _PER_ROW:
            # Not in place: the best iterate may still be the caller's start.
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(part, name)))

    def update(self, norm_g: Tensor, norm_f: Tensor) -> _Outcome:
        """Take in one evaluation.

        Args:
            norm_g (Tensor): (N,) ``|f(z) - z|``.
            norm_f (Tensor): (N,) ``|f(z)|``.
        """
        residual = _relative(norm_g, norm_f)
        if self.limit is None:
            self.limit = _EXPLODED * norm_g
        else:
            residual = torch.where(self.active, residual, self.trace[-1])
        self.trace.append(residual)
        self.num_iter += self.active
        improved = self.active & (residual < self.residual)
        self.residual = torch.where(improved, residual, self.residual)
        finite = torch.isfinite(residual)
        converged = self.active & (residual <= self.solver.tol)
        exploded = self.active & finite & (residual > _EXPLODED) & (norm_g > self.limit)
        broken = self.active & ~finite
        for mask, code in (
            (converged, Status.CONVERGED),
            (exploded, Status.DIVERGED),
            (broken, Status.NON_FINITE),
        ):
            self.status.masked_fill_(mask, int(code))
        self.active = self.active & ~(converged | exploded | broken)
        if not self.asks or len(self.trace) % self.solver.check_every:
            return _Outcome(improved)
        # The one transfer to the host.
        all_improved, num_active = torch.stack([improved.all(), self.active.sum()]).tolist()
        return _Outcome(improved, bool(all_improved), num_active)

    def solution(self, state: Any) -> Solution:
        return Solution(
            z=self.best,
            residual=self.residual,
            num_iter=self.num_iter,
            trace=torch.stack(self.trace),
            status=self.status,
            state=state,
        )


def _relative(norm_g: Tensor, norm_f: Tensor) -> Tensor:
    """(N,) ``|g| / |f(z)|``, finite where f(z) = 0, inf where |f(z)| overflows."""
    info = torch.finfo(norm_g.dtype)
    ratio = norm_g / torch.maximum(norm_f, info.eps * norm_g).clamp(min=info.tiny)
    return torch.where(torch.isfinite(norm_f), ratio, float('inf'))


@torch.no_grad()
def solve(
    f: Function,
    z0: Tensor,
    solver: Solver,
    keep_state: bool = False,
    f_of_rows: Callable[[Tensor], Function] | None = None,
    state: Any = None,
) -> Solution:
    """Find z with f(z) = z, one independent problem per row.

    Runs without grad. A sample that reached ``solver.tol`` is frozen, so its answer does not
    depend on the rest of its batch; one that explodes or turns non-finite is frozen at its best
    iterate. The state stays in the dtype of ``z0`` whatever f returns.

    Args:
        f: (N, D) -> (N, D), pure: same z, same value, and z is left as it was.
        z0 (Tensor): (N, D) where to start; zeros in an MDEQ (paper, §3.2).
        solver (Solver): The method and its limits.
        keep_state (bool): Put the solver's final state on the solution.
        f_of_rows: Given indices (K,), returns f for these rows, (K, D) -> (K, D). With it frozen
            samples cost nothing: once at most half the rows are active, only those continue. Not
            used with ``keep_state``, which needs the state of all.
        state: The state of a solution of a similar problem by the same solver, with the same
            (N, D). The solve goes on with its history, which is overwritten.

    Raises:
        ValueError: If ``z0`` is not a real floating-point (N, D), or f changes the shape.
    """
    if z0.dim() != 2 or not z0.is_floating_point():
        raise ValueError(
            f'z0 must be a real floating-point tensor (N, D), got {z0.dtype} {tuple(z0.shape)}.'
        )
    # Contiguous rows, also in all buffers made like it.
    z0 = z0.detach().contiguous()
    record = _Record(z0, solver)
    state = solver.init(z0) if state is None else solver.resume(state, z0)
    if keep_state or not record.asks:
        f_of_rows = None
    with uncached_autocast(z0.device.type):
        _iterate(f, z0, None, state, record, f_of_rows)
    return record.solution(state if keep_state else None)


@contextmanager
def uncached_autocast(device: str) -> Iterator[None]:
    """Keep autocast from caching weights that it casts while f runs without grad.

    A later call with grad, in this thread or another, would find the weight that was cast without
    grad, and its parameter would get no gradient.
    """
    if device == 'meta' or not torch.is_autocast_enabled(device):
        yield
        return
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _iterate(
    f: Function,
    z: Tensor,
    step: Tensor | None,
    state: Any,
    record: _Record,
    f_of_rows: Callable[[Tensor], Function] | None,
) -> None:
    """Iterate from ``z`` until no row is active or the budget is spent; fills ``record``.

    ``step`` is the displacement that led to ``z``; None at a start, which belongs to the caller.
    """
    solver = record.solver
    # A subset of rows starts from our own copy; a start is the caller's tensor.
    borrowed = z if step is None else None
    # Large buffers are allocated once and used in turn: fresh memory costs more than the
    # arithmetic. The solver keeps one g while the next is written.
    g_buffers = (torch.empty_like(z), torch.empty_like(z))
    products = products_for(z)
    for evaluation in range(len(record.trace) + 1, solver.max_iter + 1):
        # An alias: an f that is itself a gradient may set requires_grad on its argument.
        fz = f(z.detach())
        if not recording():
            _refuse_tangent(fz)
        if fz.shape != z.shape:
            raise ValueError(f'f maps {tuple(z.shape)} to {tuple(fz.shape)}; it must keep (N, D).')
        g = g_buffers[evaluation % 2]
        outcome = record.update(*products.residual(fz.to(z.dtype), z, g))
        del fz
        if outcome.all_improved:
            record.best, free = z, record.best
        else:
            best = record.best if record.best is not borrowed else torch.empty_like(z)
            torch.where(outcome.improved[:, None], z, record.best, out=best)
            record.best, free = best, z
        if outcome.num_active == 0 or evaluation == solver.max_iter:
            break
        # Autocast is for f: the solver's own products stay in the precision of its state.
        with torch.autocast(z.device.type, enabled=False):
            step = solver.step(state, g, step)
        if outcome.num_active != z.shape[0]:
            step = step.masked_fill(~record.active[:, None], 0)
        z = z + step if free is borrowed else torch.add(z, step, out=free)
        if f_of_rows is not None and _few(outcome.num_active, z.shape[0]):
            _go_on_with_active(z, step, state, record, f_of_rows)
            break


def _refuse_tangent(fz: Tensor) -> None:
    if forward_ad.unpack_dual(fz).tangent is not None:
        raise NotImplementedError(
            'Forward-mode derivatives do not pass a solve: z* would count as a constant. Take '
            'reverse mode (backward, torch.autograd.grad), or set unrolled_layers of '
            'ImplicitLayer, which has both.'
        )


def _few(num_active: int | None, n: int) -> bool:
    return num_active is not None and 2 * num_active <= n


def _go_on_with_active(
    z: Tensor,
    step: Tensor,
    state: Any,
    record: _Record,
    f_of_rows: Callable[[Tensor], Function],
) -> None:
    """Finish the solve on the rows that are still active."""
    rows = record.active.nonzero().squeeze(1)
    part = record.select(rows)
    _iterate(
        f_of_rows(rows),
        z[rows],
        step[rows],
        record.solver.select(state, rows),
        part,
        lambda index: f_of_rows(rows[index]),
    )
    record.merge(rows, part)
