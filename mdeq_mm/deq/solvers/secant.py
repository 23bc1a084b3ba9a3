"""What Anderson and Broyden share: a short history of steps and the small system it makes.

Write s for a step, y for the change of g = f(z) - z over it, w = s + y for the change of f. Both
methods move by

    p = g - W M^-1 T' g,

T (test vectors) and W have one column per remembered step. The methods differ in T, and so in the
small matrix M = T' Y: Broyden tests with s, Anderson with y.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...options import check_choice, check_int, immutable
from .base import Solver
from .products import (
    Products,
    at_least_float32,
    combination,
    products_for,
    project,
    recording,
)


@dataclass
class SecantState:
    """History of a solve; slots are reused in turn once ``memory`` of them are full.

    Attributes:
        tests: (N, m, D) test vectors.
        images: (N, m, D) the w of the same steps.
        norms: (N, m) lengths of the test vectors, 0 where a sample did not move.
        matrix: (N, m, m) the small system M.
        rows: (N, m) products of the last step with the images.
        step: (N, D) buffer for the steps, which the solver's ``step`` returns.
        products: The long-vector operations.
        g: (N, D) value at the previous iterate.
        count: Steps seen so far.
    """

    tests: Tensor
    images: Tensor
    norms: Tensor
    matrix: Tensor
    rows: Tensor
    step: Tensor
    products: Products
    g: Tensor | None = None
    count: int = 0

    @property
    def used(self) -> int:
        """Number of slots filled."""
        return min(self.count, self.tests.shape[1])

    def weights(self, rhs: Tensor, transpose: bool = False) -> Tensor:
        """(N, used), (N, used): the solution of M c = rhs, or of M' c = rhs.

        Steps differ in length by orders of magnitude, so the system is solved for unit test
        vectors; the methods do not depend on their length. A sample that did not move has zeros in
        its row and column; a one on the diagonal gives that pair no weight. If the system is
        singular, no pair has weight: the sample takes the plain step, and the rest of the batch is
        unaffected.
        """
        used = self.used
        scale = self.norms[:, :used].reciprocal()
        # Also if a length overflows or underflows.
        scale = torch.where(torch.isfinite(scale), scale, 0.0)
        matrix = scale[:, :, None] * self.matrix[:, :used, :used] * scale[:, None, :]
        matrix = matrix + torch.diag_embed((scale == 0).to(matrix.dtype))
        if transpose:
            matrix = matrix.mT
        weights = scale * _linear_solve(matrix, scale * rhs)
        good = torch.isfinite(weights).all(dim=1, keepdim=True)
        return torch.where(good, weights, 0.0)

    def inverse_transpose(self, v: Tensor) -> Tensor:
        """(N, D) the final inverse Jacobian estimate of g, transposed, applied to ``v``.

        The step p = -H g gives H = -I + W M^-1 T', so H' v = -v + T M^-T W' v.
        """
        used = self.used
        if not used:
            return -v
        weights = self.weights(project(self.images[:, :used], v[:, None])[:, 0], transpose=True)
        return combination(weights, self.tests[:, :used]).to(v.dtype) - v


def _linear_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """(N, k, k), (N, k) -> (N, k); not finite where the matrix is singular."""
    if not recording():
        return torch.linalg.solve_ex(matrix, rhs.unsqueeze(2), check_errors=False)[0].squeeze(2)
    # ONNX has no linear solve, so this is Gauss-Jordan with partial pivoting, in operators it has.
    rows, size = torch.cat([matrix, rhs.unsqueeze(2)], dim=2), matrix.shape[1]
    free, pivots = torch.ones_like(rhs), []
    for column in range(size):
        largest = (rows[:, :, column].abs() * free).argmax(dim=1, keepdim=True)
        pivot = torch.zeros_like(rhs).scatter(1, largest, 1.0)
        row = (pivot.unsqueeze(2) * rows).sum(dim=1)
        row = row / row[:, column : column + 1]
        rows = rows - (rows[:, :, column] - pivot).unsqueeze(2) * row.unsqueeze(1)
        free = free - pivot
        pivots.append(pivot)
    return torch.stack([(pivot * rows[:, :, size]).sum(dim=1) for pivot in pivots], dim=1)


@immutable
class SecantSolver(Solver):
    """Base of the methods that learn the Jacobian from the last ``memory`` steps.

    Each evaluation of f costs one pass over the test vectors and one over the images, and nothing
    quadratic in ``memory`` times D. Memory: two states per remembered step.
    """

    memory: int = 5
    history_dtype: str | None = field(default=None, kw_only=True)

    learns_jacobian = True
    #: Whether the test vectors are the steps s, else they are the changes y.
    tests_with_steps = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_int(name, 'memory', self.memory, minimum=1)
        choices = (None, 'float32', 'bfloat16', 'float16')
        check_choice(name, 'history_dtype', self.history_dtype, choices)

    @property
    def mixing(self) -> float:
        """Share of y in the images, and of g in the step."""
        return 1.0

    def init(self, z0: Tensor) -> SecantState:
        # No step follows the last evaluation, and at the first step there is nothing to remember.
        return self._empty(z0, max(1, min(self.memory, self.max_iter - 2)))

    def _empty(self, z0: Tensor, m: int) -> SecantState:
        """A state with room for ``m`` pairs."""
        n, d = z0.shape
        dtype = getattr(torch, self.history_dtype) if self.history_dtype else z0.dtype
        small = dict(dtype=at_least_float32(z0.dtype))
        return SecantState(
            tests=z0.new_empty(n, m, d, dtype=dtype),
            images=z0.new_empty(n, m, d, dtype=dtype),
            norms=z0.new_zeros(n, m, **small),
            matrix=z0.new_zeros(n, m, m, **small),
            rows=z0.new_zeros(n, m, **small),
            step=torch.empty_like(z0),
            products=products_for(z0, dtype),
        )

    def resume(self, state: SecantState, z0: Tensor) -> SecantState:
        if state.step.shape != z0.shape or state.step.dtype != z0.dtype:
            raise ValueError(
                f'The state to go on with is of {state.step.dtype} {tuple(state.step.shape)}, the '
                f'start of {z0.dtype} {tuple(z0.shape)}. Begin without a state.'
            )
        used = state.used
        if used < state.tests.shape[1] or used >= self.memory:
            return state
        # What one solve of a small budget can fill is too small for several.
        wider = self._empty(z0, self.memory)
        for name in ('tests', 'images', 'norms', 'rows'):
            getattr(wider, name)[:, :used] = getattr(state, name)
        wider.matrix[:, :used, :used] = state.matrix
        wider.count = used
        return wider

    def step(self, state: SecantState, g: Tensor, last_step: Tensor | None) -> Tensor:
        if last_step is not None:
            projection = self._remember(state, g, last_step)
        elif state.count:
            projection = project(state.tests[:, : state.used], g[:, None])[:, 0]
        else:
            state.g = g
            return torch.mul(g, self.mixing, out=state.step)
        state.g = g
        rows = state.products.combine(
            state.images,
            state.weights(projection),
            g,
            self.mixing,
            state.step,
            rows=self.tests_with_steps,
        )
        if rows is not None:
            state.rows[:, : state.used] = rows
        return state.step

    def _remember(self, state: SecantState, g: Tensor, last_step: Tensor) -> Tensor:
        """Add a pair to the history; (N, used) the products of ``g`` with the test vectors."""
        slot = state.count % state.tests.shape[1]
        state.count += 1
        projection, column, state.norms[:, slot] = state.products.remember(
            state.tests,
            state.images,
            slot,
            state.used,
            last_step,
            g,
            state.g,
            self.mixing,
            self.tests_with_steps,
        )
        self.update_matrix(state, slot, column)
        return projection

    def update_matrix(self, state: SecantState, slot: int, column: Tensor) -> None:
        """Update row and column ``slot`` of the small system M.

        Args:
            state (SecantState): Its history already holds the new pair.
            slot (int): The slot of that pair.
            column (Tensor): (N, used) T'y for the new y.
        """
        raise NotImplementedError
