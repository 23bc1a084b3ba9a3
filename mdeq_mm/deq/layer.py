"""The implicit layer: where to start, how to solve, how the gradient passes through."""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..options import check_flag, check_int, check_kind, checks_options
from .gradients import Gradient
from .passes import forward_pass
from .problem import FunctionProblem, Problem, State, caching, problem_of
from .regularizers import JacobianRegularizer
from .solvers import Solution, Solver, Status, solve
from .solvers.base import uncached_autocast
from .solvers.products import in_transform, recording
from .start import ZeroStart

# A penalty that nobody collects keeps its graph alive: more of them than this are a mistake.
_MOST_PENALTIES = 16


@dataclass
class SolverStats:
    """What a solve did, (N,) each: relative residual, evaluations of f, Status codes."""

    residual: Tensor
    num_iter: Tensor
    status: Tensor

    @classmethod
    def of(cls, solution: Solution) -> 'SolverStats':
        return cls(solution.residual, solution.num_iter, solution.status)

    def summary(self) -> dict[str, float]:
        """Means over the batch as plain floats, 0 for an empty one. Waits for the device."""
        converged = (self.status == int(Status.CONVERGED)).float()
        failed = (self.status >= int(Status.DIVERGED)).float().sum()
        means = [x.float().sum() for x in (self.num_iter, self.residual, converged)]
        values = torch.stack([*(mean / max(len(self.status), 1) for mean in means), failed])
        return dict(zip(('nfe', 'residual', 'converged', 'failed'), values.tolist()))


class _Reports:
    """What the passes of a layer leave for others to read; copies made for a pass share it."""

    def __init__(self) -> None:
        self.forward: SolverStats | None = None
        self.backward: SolverStats | None = None
        self.warned_of_start = False
        # Modes (training or not) in which f was checked to be the same function at each call.
        self.checked: set[bool] = set()
        self._local = threading.local()

    @property
    def penalties(self) -> list[Tensor]:
        """Penalties of this thread's passes that were not collected yet."""
        return self._local.__dict__.setdefault('penalties', [])

    def took_backward(self, solution: Solution) -> None:
        self.backward = SolverStats.of(solution)

    def __deepcopy__(self, memo: dict) -> '_Reports':
        return _Reports()

    def __reduce__(self) -> tuple:
        return _Reports, ()


@checks_options
class ImplicitLayer(nn.Module):
    """A solver for the equilibrium and a way for the gradient to pass through it.

    Example::

        solver = Anderson(max_iter=30, tol=1e-4)
        layer = ImplicitLayer(solver, ImplicitGradient(solver))
        z = layer(lambda z: torch.tanh(linear(z) + x), torch.zeros_like(x))

    Args:
        solver (Solver): Finds z* in the forward pass.
        gradient (Gradient): Carries gradients through z*.
        start (ZeroStart): Where a solve begins.
        unrolled_layers (int): If positive, apply f this many times and backpropagate through all of
            them instead of solving: the warm-up of the paper (§3.3), and explicit nets.
        eval_solver (Solver, optional): Another solver for evaluation mode.
        skip_solved (bool): In evaluation mode, continue with the unsolved samples alone once at
            most half are unsolved, if the problem is separable.
        regularizer (JacobianRegularizer, optional): A penalty on f at z*, in training mode. Add the
            result of :meth:`pop_penalty` to the loss; in OpenMMLab a hook does.

    Attributes:
        forward_stats, backward_stats (SolverStats | None): What the last forward and the last
            backward solve did; None if there was none. They hold no graph.
        iteration_seed (int | None): Seed of the random choices of a training pass, such as whether
            it has a penalty, so that all processes of a run choose alike. None uses the global
            generator. ``IterationSeedHook`` sets it.
    """

    def __init__(
        self,
        solver: Solver,
        gradient: Gradient,
        start: ZeroStart = ZeroStart(),  # noqa: B008 - immutable
        unrolled_layers: int = 0,
        eval_solver: Solver | None = None,
        skip_solved: bool = False,
        regularizer: JacobianRegularizer | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.solver = check_kind(name, 'solver', solver, Solver)
        self.gradient = check_kind(name, 'gradient', gradient, Gradient)
        self.start = check_kind(name, 'start', start, ZeroStart)
        self.unrolled_layers = check_int(name, 'unrolled_layers', unrolled_layers, 0)
        self.eval_solver = eval_solver
        if eval_solver is not None:
            check_kind(name, 'eval_solver', eval_solver, Solver)
        self.skip_solved = check_flag(name, 'skip_solved', skip_solved)
        self.regularizer = regularizer
        if regularizer is not None:
            check_kind(name, 'regularizer', regularizer, JacobianRegularizer)
        if gradient.needs_state:
            _check_learns(gradient, solver)
        self.iteration_seed: int | None = None
        self._reports = _Reports()

    @property
    def forward_stats(self) -> SolverStats | None:
        return self._reports.forward

    @property
    def backward_stats(self) -> SolverStats | None:
        return self._reports.backward

    @property
    def current_solver(self) -> Solver:
        """The solver of a forward pass in the layer's present mode."""
        return self.solver if self.training or self.eval_solver is None else self.eval_solver

    def pop_penalty(self) -> Tensor | None:
        """Sum of the regularizer's penalties in this thread's passes since the last call, a scalar.

        None if no pass had one.
        """
        penalties = self._reports.penalties
        total = sum(penalties[1:], penalties[0]) if penalties else None
        penalties.clear()
        return total

    def forward(self, f: Problem | Callable[[Any], Any], z0: State | None = None) -> Any:
        """``f(z*)``, in training and evaluation alike, whatever the gradient.

        Args:
            f: A problem, a module or any function, pure within the pass. Parametrized weights of a
                module are computed once per pass; a plain function must take care of that itself.
            z0: Where to start, a tensor (N, ...) or a list or tuple of them. A problem has its own
                start.

        Returns:
            f(z*) in the structure of ``z0``, tensors that may be changed in place; for a problem,
            its ``maps`` of the state.

        Raises:
            NotImplementedError: Inside a transform of ``torch.func`` or under forward-mode
                differentiation, unless ``unrolled_layers`` is set.
        """
        _refuse_old_onnx()
        self._reports.forward = self._reports.backward = None
        with forward_pass():
            problem = problem_of(f, z0)
            if self.unrolled_layers:
                z = problem.start
                for _ in range(self.unrolled_layers):
                    z = problem(z)
            else:
                _refuse_transforms()
                z = self._equilibrium(problem)
            own = isinstance(problem, FunctionProblem)
            return problem.copied_maps(z) if own else problem.maps(z)

    def _equilibrium(self, problem: Problem) -> Tensor:
        """f(z*), (N, D)."""
        # torch checks a trace by another one without grad; both must be of the same operations.
        graph = torch.is_grad_enabled() and not torch.jit.is_tracing()
        start, solver, generator = self.start(problem, self.training), self.current_solver, None
        if self.training:
            generator = self._generator()
            solver = solver.drawn(generator)
        if graph and caching():
            # Otherwise the solve would fill the caller's cache with weights that have no graph.
            problem(start)
        if start.requires_grad and graph and not self._reports.warned_of_start:
            self._reports.warned_of_start = True
            _warn_of_learned_start()
        skips = self.skip_solved and not self.training
        keeps = graph and self.gradient.needs_state
        if keeps:
            _check_learns(self.gradient, solver)
        # The next solve would change the state that this one's gradient is to use.
        carries = self.start.history and not (self.training or keeps or recording())
        state = self.start.state(problem, solver) if carries else None
        keeps = keeps or carries
        rows = problem.rows if skips and not keeps and problem.separable else None
        solution = solve(problem, start, solver, keep_state=keeps, f_of_rows=rows, state=state)
        self._reports.forward = SolverStats.of(solution)
        self.start.remember(problem, solution.z, self.training)
        if carries:
            self.start.remember_state(problem, solver, solution)
        if not graph:
            with uncached_autocast(start.device.type):
                out = problem(solution.z)
        elif not self._regularizes(generator):
            out = self.gradient(problem, solution, self._reports.took_backward)
        else:
            watched = _Watched(problem.plain())
            out = self.gradient(watched, solution, self._reports.took_backward)
            self._keep_penalty(self.regularizer(watched.z, watched.out))
        # Rows solved apart from their batch differ from it by rounding, which f may amplify.
        if rows is None:
            self._check_function(solution, out.detach())
        return out

    def _check_function(self, solution: Solution, out: Tensor) -> None:
        """Warn if f(z*) shows that f changes from call to call.

        Checks only the first pass of each mode, because the check waits for the device.
        """
        if self.training in self._reports.checked:
            return
        self._reports.checked.add(self.training)
        found = _other_residual(solution, out)
        if found is not None:
            _warn_of_changing_function(*found)

    def _regularizes(self, generator: torch.Generator | None) -> bool:
        """Whether this pass has a penalty."""
        if self.regularizer is None or not self.training:
            return False
        draw = torch.rand((), generator=generator, device='cpu')
        return draw.item() < self.regularizer.probability

    def _generator(self) -> torch.Generator | None:
        if self.iteration_seed is None:
            return None
        return torch.Generator().manual_seed(self.iteration_seed)

    def _keep_penalty(self, penalty: Tensor) -> None:
        penalties = self._reports.penalties
        penalties.append(penalty)
        if len(penalties) > _MOST_PENALTIES:
            del penalties[0]
            _warn_of_penalty()

    def extra_repr(self) -> str:
        parts = dict(solver=self.solver, gradient=self.gradient)
        for name in ('eval_solver', 'regularizer'):
            if getattr(self, name) is not None:
                parts[name] = getattr(self, name)
        return ', '.join(f'{name}={part}' for name, part in parts.items())


def _refuse_old_onnx() -> None:
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            'The old ONNX exporter, torch.onnx.export(dynamo=False), has no operators for what a '
            'solver does. Take the one on torch.export: torch.onnx.export(model, (x,), path, '
            'dynamo=True), with dynamic_shapes for any batch and size.'
        )


def _refuse_transforms() -> None:
    if in_transform():
        raise NotImplementedError(
            'No equilibrium can be solved inside a transform of torch.func (vmap, grad, jvp and '
            'their like). Put the samples of vmap into one batch, take torch.autograd.grad for '
            'gradients, or set unrolled_layers, which works inside all of them.'
        )


def _check_learns(gradient: Gradient, solver: Solver) -> None:
    if not solver.learns_jacobian:
        raise TypeError(
            f'{type(gradient).__name__} needs a forward solver that learns the Jacobian, '
            f'LimitedMemoryBroyden or Anderson, got {type(solver).__name__}. (An eval_solver may '
            'be any, under torch.no_grad().)'
        )


def implicit_layers(model: nn.Module) -> list[ImplicitLayer]:
    """Every implicit layer of a model, whether or not it is wrapped for distributed training."""
    return [module for module in model.modules() if isinstance(module, ImplicitLayer)]


class _Watched:
    """f, which remembers the argument and the value of its first call, both in one graph."""

    def __init__(self, f: Problem) -> None:
        self.f = f
        self.z: Tensor | None = None
        self.out: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.z is not None:
            return self.f(z)
        # A gradient that treats z* as a constant passes it without grad.
        self.z = z if z.requires_grad else z.detach().requires_grad_()
        self.out = self.f(self.z)
        return self.out


def _other_residual(solution: Solution, out: Tensor) -> tuple[float, float] | None:
    """The residual a solve ended at and that of ``out`` = f(z*), if they contradict each other.

    The effect of rounding differs by dtype and device; the tolerance is generous.
    """
    # Graphs, fake tensors and those on the meta device have no values to compare.
    graph = torch.compiler.is_compiling() or recording() or out.is_meta
    if type(out) is not Tensor or graph or not out.shape[0]:
        return None
    device = out.device.type
    low = device != 'cpu' or torch.is_autocast_enabled(device)
    rounding = 1e-2 if low else 1e-7 if out.dtype == torch.float64 else 1e-3
    lengths = (torch.linalg.vector_norm(v, dim=1) for v in (out - solution.z, out))
    residual = torch.nan_to_num(torch.div(*lengths), nan=0.0, posinf=0.0).to(out.dtype)
    reported = solution.residual.to(out.dtype)
    gap = (residual - reported).abs() - 0.1 * torch.maximum(residual, reported) - rounding
    worst = gap.argmax()
    if not gap[worst] > 0:
        return None
    return reported[worst].item(), residual[worst].item()


def _warn_of_changing_function(reported: float, residual: float) -> None:
    warnings.warn(
        'f is not the same function at each call: the solve ended at a residual of '
        f'{reported:.2g}, and the next call gives {residual:.2g}. Look for dropout other than '
        'mdeq_mm.layers.VariationalDropout2d, which keeps its mask, for noise, and for '
        'norms that update themselves, such as spectral norm. Give f as a module, not as a '
        'function around one, and compile it by torch.compile(f), not by f.compile(): its weights '
        'are then computed once a forward pass. Draw masks and noise before the call of the layer.',
        stacklevel=5,
    )


def _warn_of_learned_start() -> None:
    warnings.warn(
        'ImplicitLayer was given a start that requires grad. An equilibrium does not depend on '
        'where its solve began, so no gradient reaches the start. Train it by its own loss, such '
        'as its distance from the result, and pass it detached.',
        stacklevel=4,
    )


def _warn_of_penalty() -> None:
    warnings.warn(
        'Penalties of an ImplicitLayer with a regularizer are not added to any loss: add '
        'layer.pop_penalty(), or in an OpenMMLab config '
        "default_hooks.regularizer=dict(type='MDEQRegularizerHook').",
        stacklevel=5,
    )
