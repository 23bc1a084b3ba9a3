"""Where a solve begins."""

import threading

from torch import Tensor

from ..options import immutable
from .problem import Problem, outside_inference
from .solvers.base import Part


@immutable
class ZeroStart(Part):
    """The problem's own start: zeros in an MDEQ, ``z0`` for a user's function."""

    def __call__(self, problem: Problem, training: bool) -> Tensor:
        """The state (N, D) to begin at; ``training`` is the layer's mode."""
        return problem.start

    def remember(self, problem: Problem, z: Tensor, training: bool) -> None:
        """Called with the state (N, D) at which the solve of ``problem`` ended."""

    def reset(self) -> None:
        """Forget what was remembered."""


@immutable
class PreviousStart(ZeroStart):
    """The last equilibrium, for video: the next frame's is close to it (evaluation mode only).

    A batch of another shape, dtype or device starts afresh. Training neither reads nor changes what
    is remembered. Each thread has its own stream. Nothing is saved: a copied or reloaded layer
    starts afresh.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, '_last', threading.local())

    def __call__(self, problem: Problem, training: bool) -> Tensor:
        if not training and getattr(self._last, 'kind', None) == _kind(problem):
            return outside_inference(self._last.z)
        return problem.start

    def remember(self, problem: Problem, z: Tensor, training: bool) -> None:
        if not training:
            self._last.kind, self._last.z = _kind(problem), z.detach()

    def reset(self) -> None:
        self._last.__dict__.clear()

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__post_init__()


def _kind(problem: Problem) -> tuple:
    """What two batches must share for the state of one to be a start for the other."""
    start = problem.start
    return tuple(start.shape), start.dtype, start.device, tuple(map(tuple, problem.shapes))
