"""Anderson acceleration of the fixed-point iteration."""

from torch import Tensor

from ...options import check_number, immutable
from .secant import SecantSolver, SecantState


@immutable
class Anderson(SecantSolver):
    """Anderson acceleration (type II, in difference form) over the last ``memory`` steps.

    The weights solve a least-squares problem ``min |g - Y c|``; its normal equations have a unit
    diagonal (the columns are scaled) plus ``ridge``, so they stay regular where the columns
    become dependent.

    Args:
        max_iter (int): Evaluations of f.
        tol (float): Relative residual at which a sample is solved.
        memory (int): Steps kept.
        damping (float): Share of f's value in the next iterate, in (0, 1].
        ridge (float): Added to the unit diagonal of the normal equations.
        history_dtype (str, optional): As for ``LimitedMemoryBroyden``.
        check_every, jitter: As for :class:`~mdeq_mm.deq.Solver`.
    """

    damping: float = 1.0
    ridge: float = 1e-6

    tests_with_steps = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('Anderson', 'damping', self.damping, 0, 1, open_low=True)
        check_number('Anderson', 'ridge', self.ridge, low=0)

    @property
    def mixing(self) -> float:
        return self.damping

    def update_matrix(self, state: SecantState, slot: int, column: Tensor) -> None:
        used = state.used
        state.matrix[:, slot, :used] = column
        state.matrix[:, :used, slot] = column
        # Scaled in place, torch 2.9 would fix the batch of an ONNX model.
        state.matrix[:, slot, slot] = column[:, slot] * (1 + self.ridge)
