"""How a gradient passes through an equilibrium z* = f(z*).

Each class gets f and the solution of the forward solve and returns ``f(z*)`` with a graph on it.
They differ in what they pass on to f for the gradient v that arrives at z*. With J the Jacobian of
f at z*, the exact value is (I - J')^-1 v (paper, Eq. 3).

=========================  ==============================  ============================
gradient                   v becomes                       cost, beyond one f and vjp
=========================  ==============================  ============================
ImplicitGradient           (I - J')^-1 v to tol            max_iter vjp, solver memory
TruncatedGradient          k damped steps towards that     k vjp
JacobianFreeGradient       v                               none
SharedInverseGradient      -H'v, H the forward solver's    one pass over the solver's
                           estimate of (J - I)^-1          history, kept until then
PhantomGradient            v through k damped layers       k - 1 f and vjp, k graphs
=========================  ==============================  ============================
"""

from collections.abc import Callable
from dataclasses import field

import torch
from torch import Tensor

from ..options import check_int, check_kind, check_number, immutable
from .solvers import LimitedMemoryBroyden, Solution, Solver, solve
from .solvers.base import Function, Part

Report = Callable[[Solution], None]


class Gradient(Part):
    """A way for a gradient to pass through an equilibrium.

    Attributes:
        needs_state (bool): Whether the solution must carry the forward solver's final state, an
            estimate of the inverse Jacobian.
    """

    needs_state = False

    def __call__(self, f: Function, solution: Solution, report: Report | None = None) -> Tensor:
        """``f(z*)``, (N, D), differentiable in all that f depends on.

        Called in grad mode. Where no gradient is needed, ``ImplicitLayer`` calls f itself.

        Args:
            f: The function of the equilibrium.
            solution: What :func:`~mdeq_mm.deq.solve` found.
            report: Called with the solution of the backward solve, if there is one.
        """
        raise NotImplementedError


def _one_call(f: Function, solution: Solution) -> tuple[Tensor, Tensor]:
    """``z*`` as a leaf and ``f(z*)`` with its graph."""
    z = solution.z.detach().requires_grad_()
    return z, f(z)


def _vjp(out: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """J'v. Zero where ``out`` does not depend on ``z``."""
    (grad,) = torch.autograd.grad(out, z, v, retain_graph=True, allow_unused=True)
    return torch.zeros_like(v) if grad is None else grad


def _on_gradient(out: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``out``, with ``change`` applied to the gradient that passes on to f.

    The hook sits on a view, between ``out`` and the returned tensor. The graph of ``out`` stays
    free of it, so the hook may differentiate ``out`` again, and the gradient with respect to the
    returned tensor is the loss's own.
    """
    if not out.requires_grad:
        return out
    inner = out.view_as(out)

    def hook(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        if torch.is_grad_enabled():
            raise NotImplementedError(
                'Second derivatives through an equilibrium are not available from the backward '
                'hook. Call backward without create_graph=True, or take PhantomGradient or '
                'unrolled_layers, which have them.'
            )
        return change(grad)

    inner.register_hook(hook)
    return inner.view_as(inner)


@immutable
class ImplicitGradient(Gradient):
    """The exact gradient: solves g = J'g + v in the backward hook (paper, Eq. 4).

    Args:
        solver (Solver): Solver of the linear fixed point, started at v.
    """

    solver: Solver = field(default_factory=LimitedMemoryBroyden)

    def __post_init__(self) -> None:
        check_kind('ImplicitGradient', 'solver', self.solver, Solver)
        if self.solver.jitter is not None:
            raise ValueError(
                f'ImplicitGradient: jitter={self.solver.jitter} is for the forward solver; '
                "remove it from the gradient's solver."
            )

    def __call__(self, f: Function, solution: Solution, report: Report | None = None) -> Tensor:
        z, out = _one_call(f, solution)

        def change(v: Tensor) -> Tensor:
            adjoint = solve(lambda g: _vjp(out, z, g) + v, v, self.solver)
            if report is not None:
                report(adjoint)
            return adjoint.z

        return _on_gradient(out, change)


@immutable
class TruncatedGradient(Gradient):
    """A few damped iterations of g = J'g + v from v, instead of its solution.

    At ``damping=1`` it is the first terms of the Neumann series, v + J'v + ... + (J')^steps v. The
    rest of the series is the bias: for a J of norm rho < 1, at most ``rho^(steps + 1)`` of the
    exact gradient. Where f does not contract, which happens during training, these terms grow.

    Args:
        steps (int): Vector-Jacobian products.
        damping (float): Each step is g <- (1 - damping) g + damping (J'g + v), in (0, 1].
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_int('TruncatedGradient', 'steps', self.steps, minimum=1)
        check_number('TruncatedGradient', 'damping', self.damping, 0, 1, open_low=True)

    def __call__(self, f: Function, solution: Solution, report: Report | None = None) -> Tensor:
        z, out = _one_call(f, solution)
        return _on_gradient(out, lambda v: _neumann(out, z, v, v, self.steps, self.damping))


def _neumann(
    out: Tensor, z: Tensor, v: Tensor, start: Tensor, steps: int, damping: float = 1.0
) -> Tensor:
    """``steps`` damped iterations of g = J'g + v from ``start``."""
    g = start
    for _ in range(steps):
        g = torch.lerp(g, _vjp(out, z, g) + v, damping)
    return g


@immutable
class JacobianFreeGradient(Gradient):
    """The gradient of one application of f at the equilibrium, as if z* were a constant."""

    def __call__(self, f: Function, solution: Solution, report: Report | None = None) -> Tensor:
        return f(solution.z.detach())


@immutable
class SharedInverseGradient(Gradient):
    """Reuses the inverse Jacobian that the forward quasi-Newton solver has estimated (SHINE).

    The estimate is good along the directions in which the solver moved, and v points elsewhere. A
    sample whose estimate is too long falls back to the Jacobian-free gradient. The forward solver
    must be ``LimitedMemoryBroyden`` or ``Anderson``.

    Args:
        steps (int): Plain iterations of g = J'g + v from the estimate, one vjp each.
        max_growth (float): Fall back where the estimate is more than this many times as long as v.
    """

    steps: int = 0
    max_growth: float = 1.3

    needs_state = True

    def __post_init__(self) -> None:
        check_int('SharedInverseGradient', 'steps', self.steps, minimum=0)
        check_number('SharedInverseGradient', 'max_growth', self.max_growth, low=0)

    def __call__(self, f: Function, solution: Solution, report: Report | None = None) -> Tensor:
        z, out = _one_call(f, solution)
        state = solution.state

        def change(v: Tensor) -> Tensor:
            g = -state.inverse_transpose(v)
            length = torch.linalg.vector_norm(g, dim=1)
            limit = self.max_growth * torch.linalg.vector_norm(v, dim=1)
            # Written so that nan falls back as well.
            g = torch.where((length <= limit)[:, None], g, v)
            return _neumann(out, z, v, g, self.steps)

        return _on_gradient(out, change)


@immutable
class PhantomGradient(Gradient):
    """Plain backpropagation through a few damped layers that start at the equilibrium.

    z <- (1 - damping) z + damping f(z), ``steps`` times. Its graph holds ``steps`` calls of f. The
    value stays f(z*), which the first of them computes; the layers only make the gradient. It can
    be differentiated again.

    Args:
        steps (int): Layers unrolled.
        damping (float): Share of the new value in each, in (0, 1].
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_int('PhantomGradient', 'steps', self.steps, minimum=1)
        check_number('PhantomGradient', 'damping', self.damping, 0, 1, open_low=True)

    def __call__(self, f: Function, solution: Solution, report: Report | None = None) -> Tensor:
        value = f(solution.z.detach())
        z = torch.lerp(solution.z.detach(), value, self.damping)
        for _ in range(self.steps - 1):
            z = torch.lerp(z, f(z), self.damping)
        return _Relabel.apply(z, value)


class _Relabel(torch.autograd.Function):
    """The value of the second tensor, the graph of the first."""

    @staticmethod
    def forward(ctx, z: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
