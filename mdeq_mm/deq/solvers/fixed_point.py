"""Plain (damped) iteration of f."""

from torch import Tensor

from ...options import check_number, immutable
from .base import Solver


@immutable
class FixedPointIteration(Solver):
    """z <- z + damping (f(z) - z), the paper's Eq. (1) at ``damping=1``.

    Converges where f contracts; needs no memory beyond the iterate.

    Args:
        max_iter (int): Evaluations of f.
        tol (float): Relative residual at which a sample is solved.
        damping (float): Share of the new value taken, in (0, 1].
        check_every, jitter: As for :class:`~mdeq_mm.deq.Solver`.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(type(self).__name__, 'damping', self.damping, 0, 1, open_low=True)

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, state: None, g: Tensor, last_step: Tensor | None) -> Tensor:
        return g if self.damping == 1 else self.damping * g
