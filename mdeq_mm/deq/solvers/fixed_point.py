"""Plain (damped) iteration of f."""

from typing import Optional

from torch import Tensor

from ...options import check_number, checks_options
from .base import Solver


@checks_options
class FixedPointIteration(Solver):
    """z <- z + damping (f(z) - z), the paper's Eq. (1) at ``damping=1``.

    Converges where f contracts; needs no memory beyond the iterate.

    Args:
        max_iter (int): Evaluations of f.
        tol (float): Relative residual at which a sample is solved.
        damping (float): Share of the new value taken, in (0, 1].
    """

    def __init__(self, max_iter: int = 30, tol: float = 1e-3, damping: float = 1.0) -> None:
        super().__init__(max_iter, tol)
        self.damping = check_number(type(self).__name__, 'damping', damping, 0, 1, open_low=True)

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, state: None, g: Tensor, last_step: Optional[Tensor]) -> Tensor:
        return g if self.damping == 1 else self.damping * g
