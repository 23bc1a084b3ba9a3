"""The implicit layer."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..options import check_int
from .gradients import Gradient
from .solvers import Solution, Solver, Status, solve
from .solvers.base import Function


@dataclass
class SolverStats:
    """What a solve did, (N,) each: relative residual, evaluations of f, Status codes."""

    residual: Tensor
    num_iter: Tensor
    status: Tensor

    @classmethod
    def of(cls, solution: Solution) -> 'SolverStats':
        return cls(solution.residual, solution.num_iter, solution.status)

    def summary(self) -> Dict[str, float]:
        """Means over the batch as plain floats. Waits for the device."""
        converged = (self.status == int(Status.CONVERGED)).float().mean()
        failed = (self.status >= int(Status.DIVERGED)).float().sum()
        values = torch.stack(
            [self.num_iter.float().mean(), self.residual.float().mean(), converged, failed]
        )
        return dict(zip(('nfe', 'residual', 'converged', 'failed'), values.tolist()))


class ImplicitLayer(nn.Module):
    """A solver for the equilibrium and a way for the gradient to pass it.

    Args:
        solver (dict | Solver): Finds z* in the forward pass.
        gradient (dict | Gradient): Carries gradients past z*.
        unrolled_layers (int): If positive, apply f so many times and backpropagate through all
            of them, instead of solving: the warm-up of the paper (§3.3), and explicit nets.
        eval_solver (dict, optional): Options that differ in evaluation mode, as
            ``dict(max_iter=18)``. A ``type`` among them replaces the solver whole.
        skip_solved (bool): Go on with the unsolved samples alone once at most half are unsolved,
            where the caller can say what f is for them.

    Attributes:
        forward_stats, backward_stats (SolverStats | None): What the last solve of either kind
            did; None where none took place. They hold no graph.
    """

    def __init__(
        self,
        solver: Union[Dict[str, Any], Solver],
        gradient: Union[Dict[str, Any], Gradient],
        unrolled_layers: int = 0,
        eval_solver: Optional[Dict[str, Any]] = None,
        skip_solved: bool = False,
    ) -> None:
        from ..registry import build_part

        super().__init__()
        self.solver = build_part(solver, Solver)
        self.eval_solver: Optional[Solver] = None
        if eval_solver is not None:
            self.eval_solver = build_part(_with_changes(solver, eval_solver), Solver)
        self.gradient = build_part(gradient, Gradient)
        self.unrolled_layers = check_int('ImplicitLayer', 'unrolled_layers', unrolled_layers, 0)
        self.skip_solved = skip_solved
        self.forward_stats: Optional[SolverStats] = None
        self.backward_stats: Optional[SolverStats] = None

    def forward(
        self,
        f: Function,
        z0: Tensor,
        f_of_rows: Optional[Callable[[Tensor], Function]] = None,
    ) -> Tensor:
        """``f(z*)``, (N, D), in training and evaluation alike.

        Args:
            f: As :func:`~mdeq_mm.solvers.solve` takes it.
            z0 (Tensor): (N, D) where to start.
            f_of_rows: f for some rows alone, for ``skip_solved``.
        """
        self.forward_stats = self.backward_stats = None
        # What f computes from parametrized weights is the same at each call: once is enough.
        if self.unrolled_layers:
            with parametrize.cached():
                z = z0
                for _ in range(self.unrolled_layers):
                    z = f(z)
                return z
        with parametrize.cached():
            solution = solve(
                f,
                z0,
                self.current_solver,
                keep_state=self.gradient.needs_state,
                f_of_rows=f_of_rows if self.skip_solved else None,
            )
        self.forward_stats = SolverStats.of(solution)
        # Weights cached without grad, by autocast too, would cut the parameters off.
        torch.clear_autocast_cache()
        with parametrize.cached():
            return self.gradient(f, solution, self._report_backward)

    @property
    def current_solver(self) -> Solver:
        """The solver of a forward pass in the mode the layer is in."""
        return self.solver if self.training or self.eval_solver is None else self.eval_solver

    def _report_backward(self, solution: Solution) -> None:
        self.backward_stats = SolverStats.of(solution)

    def extra_repr(self) -> str:
        evaluation = '' if self.eval_solver is None else f', eval_solver={self.eval_solver}'
        return f'solver={self.solver}, gradient={type(self.gradient).__name__}{evaluation}'


def _with_changes(solver: Union[Dict[str, Any], Solver], changes: Any) -> Any:
    """Options of the evaluation's solver: those of ``solver`` but for ``changes``."""
    if isinstance(changes, Mapping) and 'type' not in changes:
        if not isinstance(solver, Mapping):
            raise TypeError(
                f'eval_solver={changes!r} changes options of a solver given as a dict, and solver '
                f"is {solver!r}. Give eval_solver a 'type' and all its options."
            )
        return {**solver, **changes}
    return changes
