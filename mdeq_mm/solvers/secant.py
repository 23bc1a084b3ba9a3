"""What Anderson and Broyden share: a short history of steps and the small system it makes.

Write s for a step, y for the change of g = f(z) - z over it, w = s + y for the change of f. Both
methods move by

    p = g - W M^-1 T' g,

T (test vectors) and W with one column per remembered step. They differ in T and in the small
matrix M = T' Y they let it be: Broyden tests with s, Anderson with y.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ..options import check_int
from .base import Solver


@dataclass
class SecantState:
    """History of a solve; slots are reused in turn once ``memory`` of them are full.

    Attributes:
        tests: (N, m, D) test vectors, each scaled to unit length.
        images: (N, m, D) the w of the same steps, scaled by the same factor.
        matrix: (N, m, m) the small system M; the identity where nothing is stored.
        projection: (N, m) ``T' g`` at the previous iterate.
        g: (N, D) value at the previous iterate.
        count: Steps seen so far.
    """

    tests: Tensor
    images: Tensor
    matrix: Tensor
    projection: Tensor
    g: Optional[Tensor] = None
    count: int = 0

    @property
    def used(self) -> int:
        """Number of slots filled."""
        return min(self.count, self.tests.shape[1])

    def inverse_transpose(self, v: Tensor) -> Tensor:
        """(N, D) the final inverse Jacobian estimate of g, transposed, applied to ``v``.

        The step p = -H g gives H = -I + W M^-1 T', so H' v = -v + T M^-T W' v.
        """
        used = self.used
        if not used:
            return -v
        small = _small_solve(
            self.matrix[:, :used, :used].mT, _project(self.images[:, :used], v.to(self.images))
        )
        return _combine(self.tests[:, :used], small).sub_(v)


def _project(basis: Tensor, v: Tensor) -> Tensor:
    """(N, k, D), (N, D) -> (N, k) inner products.

    The vector stands on the left: on a CPU the product then runs at the speed of memory, four
    times faster than with the vector on the right.
    """
    return torch.bmm(v.unsqueeze(1), basis.mT).squeeze(1)


def _combine(basis: Tensor, weights: Tensor) -> Tensor:
    """(N, k, D), (N, k) -> (N, D) linear combination."""
    return torch.bmm(weights.unsqueeze(1), basis).squeeze(1)


def _small_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """(N, k, k), (N, k) -> (N, k); a sample whose system is singular gets zeros.

    Zero weights make that sample's step the plain one, and leave its batch-mates alone.
    """
    weights, _ = torch.linalg.solve_ex(matrix, rhs.unsqueeze(2), check_errors=False)
    weights = weights.squeeze(2)
    good = torch.isfinite(weights).all(dim=1, keepdim=True)
    return torch.where(good, weights, torch.zeros_like(weights))


class SecantSolver(Solver):
    """Base of the methods that learn the Jacobian from the last ``memory`` steps.

    Costs per evaluation of f three passes (Broyden) or two (Anderson) over ``memory`` states,
    and nothing quadratic in ``memory`` times D. Memory: two states a remembered step.
    """

    def __init__(self, max_iter: int, tol: float, memory: int) -> None:
        super().__init__(max_iter, tol)
        self.memory = check_int(type(self).__name__, 'memory', memory, minimum=1)

    mixing = 1.0

    def init(self, z0: Tensor) -> SecantState:
        n, d = z0.shape
        # The last evaluation is followed by no step and the first step has nothing to remember.
        m = max(1, min(self.memory, self.max_iter - 2))
        return SecantState(
            tests=z0.new_empty(n, m, d),
            images=z0.new_empty(n, m, d),
            matrix=torch.eye(m, dtype=z0.dtype, device=z0.device).repeat(n, 1, 1),
            projection=z0.new_zeros(n, m),
        )

    def step(self, state: SecantState, g: Tensor, last_step: Optional[Tensor]) -> Tensor:
        if last_step is None:
            state.g = g
            return g if self.mixing == 1 else self.mixing * g
        slot = state.count % state.tests.shape[1]
        state.count += 1
        scale = self._remember(state, slot, last_step, g - state.g)
        tests, images = state.tests[:, : state.used], state.images[:, : state.used]
        projection = _project(tests, g)
        self._update_matrix(state, slot, projection, scale)
        state.projection[:, : state.used] = projection
        state.g = g
        weights = _small_solve(state.matrix[:, : state.used, : state.used], projection)
        return torch.baddbmm(
            g.unsqueeze(1), weights.unsqueeze(1), images, beta=self.mixing, alpha=-1
        ).squeeze(1)

    def _remember(self, state: SecantState, slot: int, s: Tensor, y: Tensor) -> Tensor:
        """Store the pair of the last step; (N, 1) the factor that scaled it.

        The methods do not feel a common factor on s and y; unit test vectors keep the small
        system well scaled while the steps shrink by orders of magnitude. A sample that did not
        move (frozen, or stalled to the last bit) stores zeros and so teaches nothing.
        """
        test = self.test_vector(s, y)
        norm = torch.linalg.vector_norm(test, dim=1, keepdim=True)
        scale = torch.where(norm > 0, norm.reciprocal(), torch.zeros_like(norm))
        # An overflow here (a norm of inf, or one so small that its inverse is inf) likewise.
        scale = torch.where(torch.isfinite(scale), scale, torch.zeros_like(scale))
        torch.mul(test, scale, out=state.tests[:, slot])
        torch.add(s, y, alpha=self.mixing, out=state.images[:, slot])
        state.images[:, slot] *= scale
        return scale

    def _update_matrix(
        self, state: SecantState, slot: int, projection: Tensor, scale: Tensor
    ) -> None:
        """Renew row and column ``slot`` of the small system."""
        raise NotImplementedError

    @staticmethod
    def test_vector(s: Tensor, y: Tensor) -> Tensor:
        """What the method tests g with: s or y, (N, D)."""
        raise NotImplementedError
