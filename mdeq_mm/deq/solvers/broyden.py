"""Limited-memory Broyden's method in its compact form."""

from torch import Tensor

from ...options import immutable
from .secant import SecantSolver, SecantState


@immutable
class LimitedMemoryBroyden(SecantSolver):
    """Broyden's (good) method that keeps the latest ``memory`` updates (paper, §3.2).

    The Jacobian of g = f - id starts as -I, so the first step is a plain iteration. The compact
    form B = -I + W N^-1 S', with N the upper triangle of S'S by age, is a Broyden matrix of the
    remembered pairs whatever was forgotten before them (Byrd, Nocedal & Schnabel 1994,
    "Representations of quasi-Newton matrices"); dropping rank-one terms of the product form is
    not, and diverges. By the Woodbury identity the step -B^-1 g needs the small matrix
    M = S'W - N, which is S'y in the column of a pair and s'w in its row towards older ones.

    Args:
        max_iter (int): Evaluations of f.
        tol (float): Relative residual at which a sample is solved.
        memory (int): Pairs kept. With ``memory >= max_iter`` this is textbook Broyden.
        history_dtype (str, optional): Keep the pairs in another dtype than the state's, such as
            ``'bfloat16'`` for half the memory.
        check_every, jitter: As for :class:`~mdeq_mm.deq.Solver`.
    """

    def update_matrix(self, state: SecantState, slot: int, column: Tensor) -> None:
        used = state.used
        # S'y goes into the column and s'w into the row; the column then overwrites the shared
        # entry.
        state.matrix[:, slot, :used] = state.rows[:, :used]
        state.matrix[:, :used, slot] = column
