"""How a gradient passes an equilibrium z* = f(z*).

Each class gets f and the solution of the forward solve and returns ``f(z*)`` with a graph on it.
They differ in what they make of the gradient v that arrives there, where J is the Jacobian of f
at z*; exact is (I - J')^-1 v (paper, Eq. 3).

=========================  ==============================  ============================
gradient                   v becomes                       cost, beyond one f and vjp
=========================  ==============================  ============================
ImplicitGradient           (I - J')^-1 v to tol            max_iter vjp, solver memory
TruncatedGradient          k damped steps towards that     k vjp
JacobianFreeGradient       v                               none
SharedInverseGradient      -H'v, H the forward solver's    one pass over the solver's
                           estimate of (J - I)^-1          history, kept until then
PhantomGradient            v through k damped layers       k f and vjp, k graphs
=========================  ==============================  ============================
"""

from typing import Any, Callable, Dict, Optional, Union

import torch
from torch import Tensor

from ..options import check_int, check_number, checks_options
from .solvers import Solution, Solver, solve
from .solvers.base import Function

Report = Callable[[Solution], None]


class Gradient:
    """A way for a gradient to pass an equilibrium.

    Attributes:
        needs_state (bool): Whether the solution must carry the forward solver's final state.
    """

    needs_state = False

    def __call__(self, f: Function, solution: Solution, report: Optional[Report] = None) -> Tensor:
        """``f(z*)``, (N, D), differentiable in all that f depends on.

        Args:
            f: The function of the equilibrium.
            solution: What :func:`~mdeq_mm.solvers.solve` found.
            report: Called with the solution of the backward solve, once there is one.
        """
        raise NotImplementedError


def _one_call(f: Function, solution: Solution) -> tuple:
    """``z*`` as a leaf and ``f(z*)`` with its graph."""
    z = solution.z.detach().requires_grad_()
    return z, f(z)


def _on_gradient(out: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``out``, with ``change`` applied to the gradient that reaches it.

    The hook sits on a view: the graph of ``out`` itself stays free of it, so the hook may
    differentiate ``out`` again, nothing has to be removed, and forwards do not share state.
    """
    if not out.requires_grad:
        return out
    view = out.view_as(out)

    def hook(grad: Optional[Tensor]) -> Optional[Tensor]:
        if grad is None:
            return None
        if torch.is_grad_enabled():
            raise NotImplementedError(
                'Second derivatives through an equilibrium are not available from the backward '
                'hook. Call backward without create_graph=True, or set unrolled_layers.'
            )
        return change(grad)

    view.register_hook(hook)
    return view


@checks_options
class ImplicitGradient(Gradient):
    """The exact gradient: solves g = J'g + v in the backward hook (paper, Eq. 4).

    Args:
        solver (dict | Solver): Solver of the linear fixed point, started at v.
    """

    def __init__(self, solver: Union[Dict[str, Any], Solver]) -> None:
        from ..registry import build_part

        self.solver = build_part(solver, Solver)

    def __call__(self, f: Function, solution: Solution, report: Optional[Report] = None) -> Tensor:
        z, out = _one_call(f, solution)

        def change(v: Tensor) -> Tensor:
            adjoint = solve(
                lambda g: torch.autograd.grad(out, z, g, retain_graph=True)[0] + v, v, self.solver
            )
            if report is not None:
                report(adjoint)
            return adjoint.z

        return _on_gradient(out, change)


@checks_options
class TruncatedGradient(Gradient):
    """A few damped iterations of g = J'g + v from v, in place of its solution.

    At ``damping=1`` the first terms of the Neumann series, v + J'v + ... + (J')^steps v. Biased by
    what the series leaves out, at most ``rho^(steps + 1)`` of the exact gradient for a J of norm
    rho < 1. Where f does not contract, as it need not while it is trained, these terms grow.

    Args:
        steps (int): Vector-Jacobian products.
        damping (float): Each step is g <- (1 - damping) g + damping (J'g + v), in (0, 1].
    """

    def __init__(self, steps: int = 5, damping: float = 0.5) -> None:
        self.steps = check_int('TruncatedGradient', 'steps', steps, minimum=1)
        self.damping = check_number('TruncatedGradient', 'damping', damping, 0, 1, open_low=True)

    def __call__(self, f: Function, solution: Solution, report: Optional[Report] = None) -> Tensor:
        z, out = _one_call(f, solution)
        return _on_gradient(out, lambda v: _neumann(out, z, v, v, self.steps, self.damping))


def _neumann(
    out: Tensor, z: Tensor, v: Tensor, start: Tensor, steps: int, damping: float = 1.0
) -> Tensor:
    """``steps`` damped iterations of g = J'g + v from ``start``."""
    g = start
    for _ in range(steps):
        new = torch.autograd.grad(out, z, g, retain_graph=True)[0] + v
        g = torch.lerp(g, new, damping)
    return g


@checks_options
class JacobianFreeGradient(Gradient):
    """The gradient of one application of f at the equilibrium, as if z* were a constant."""

    def __init__(self) -> None:
        pass

    def __call__(self, f: Function, solution: Solution, report: Optional[Report] = None) -> Tensor:
        return f(solution.z.detach())


@checks_options
class SharedInverseGradient(Gradient):
    """Reuses the inverse Jacobian the forward quasi-Newton solver has learnt (SHINE).

    The estimate is good along the directions the solver moved in, which are not those of v. A
    sample on which it blows v up falls back to the Jacobian-free gradient. The forward solver has
    to be ``LimitedMemoryBroyden`` or ``Anderson``.

    Args:
        steps (int): Plain iterations of g = J'g + v from the estimate, one vjp each.
        max_growth (float): Fall back where the estimate is longer than this many times v.
    """

    needs_state = True

    def __init__(self, steps: int = 0, max_growth: float = 1.3) -> None:
        self.steps = check_int('SharedInverseGradient', 'steps', steps, minimum=0)
        self.max_growth = check_number('SharedInverseGradient', 'max_growth', max_growth, low=0)

    def __call__(self, f: Function, solution: Solution, report: Optional[Report] = None) -> Tensor:
        if not hasattr(solution.state, 'inverse_transpose'):
            raise TypeError(
                'SharedInverseGradient needs a forward solver that learns the Jacobian: '
                'LimitedMemoryBroyden or Anderson.'
            )
        z, out = _one_call(f, solution)
        state = solution.state

        def change(v: Tensor) -> Tensor:
            g = -state.inverse_transpose(v)
            length = torch.linalg.vector_norm(g, dim=1)
            limit = self.max_growth * torch.linalg.vector_norm(v, dim=1)
            # Written so that nan falls back, too.
            g = torch.where((length <= limit)[:, None], g, v)
            return _neumann(out, z, v, g, self.steps)

        return _on_gradient(out, change)


@checks_options
class PhantomGradient(Gradient):
    """Plain backpropagation through a few damped layers that start at the equilibrium.

    z <- (1 - damping) z + damping f(z), ``steps`` times. Its graph holds ``steps`` calls of f.

    Args:
        steps (int): Layers unrolled.
        damping (float): Share of the new value in each, in (0, 1].
    """

    def __init__(self, steps: int = 5, damping: float = 0.5) -> None:
        self.steps = check_int('PhantomGradient', 'steps', steps, minimum=1)
        self.damping = check_number('PhantomGradient', 'damping', damping, 0, 1, open_low=True)

    def __call__(self, f: Function, solution: Solution, report: Optional[Report] = None) -> Tensor:
        z = solution.z.detach()
        for _ in range(self.steps):
            z = torch.lerp(z, f(z), self.damping)
        return z
