"""Where a solve begins."""

import threading
from typing import Any

from torch import Tensor

from ..options import check_flag, check_int, immutable
from .motion import motion_between, moved_along
from .problem import Problem, outside_inference
from .solvers.base import Part, Solution, Solver, Status, with_tensors


@immutable
class ZeroStart(Part):
    """The problem's own start: zeros in an MDEQ, ``z0`` for a user's function."""

    #: Whether a solve also goes on with what the last one learned of the Jacobian.
    history = False

    def __call__(self, problem: Problem, training: bool) -> Tensor:
        """The state (N, D) to begin at; ``training`` is the layer's mode."""
        return problem.start

    def remember(self, problem: Problem, z: Tensor, training: bool) -> None:
        """Called with the state (N, D) at which the solve of ``problem`` ended."""

    def state(self, problem: Problem, solver: Solver) -> Any:
        """The solver's state to go on with, or None; asked for in evaluation if ``history``."""

    def remember_state(self, problem: Problem, solver: Solver, solution: Solution) -> None:
        """Called with each solution that has such a state."""

    def reset(self) -> None:
        """Forget what was remembered."""


@immutable
class PreviousStart(ZeroStart):
    """The last equilibrium, for video: the next frame's is close to it (evaluation mode only).

    A batch of another shape, dtype or device starts afresh. Training neither reads nor changes what
    is remembered. Each thread has its own stream. Nothing is saved: a copied or reloaded layer
    starts afresh.

    Args:
        history (bool): Anderson and Broyden also go on with the last solve's history, unless that
            solve failed. It pays with a memory of about as many pairs as a solve has evaluations;
            these stay allocated between frames.
        motion (int): If positive, the last equilibrium is moved along with what moved in the
            injection since, by at most so many whole pixels of it; what is compared is the mean
            size of its channels. It needs a problem with a ``scene``, as that of a cell; the
            equilibrium of another stays where it is. Time and memory grow with its square.
    """

    history: bool = False
    motion: int = 0

    def __post_init__(self) -> None:
        check_flag('PreviousStart', 'history', self.history)
        check_int('PreviousStart', 'motion', self.motion, 0)
        object.__setattr__(self, '_last', threading.local())

    def __call__(self, problem: Problem, training: bool) -> Tensor:
        if training or getattr(self._last, 'kind', None) != _kind(problem):
            return problem.start
        z = outside_inference(self._last.z)
        before, now = self._last.scene, self._scene(problem)
        if before is None or now is None or before.shape != now.shape:
            return z
        motion = motion_between(before, now, self.motion)
        return problem.flat([moved_along(part, motion) for part in problem.maps(z)])

    def _scene(self, problem: Problem) -> Tensor | None:
        """What shows the motion, (N, 1, H, W) in the dtype of the state; a tensor of its own."""
        scene = problem.scene if self.motion else None
        if scene is None:
            return None
        # Channels may cancel, their sizes do not.
        return scene.detach().to(problem.start.dtype).abs().mean(1, keepdim=True)

    def remember(self, problem: Problem, z: Tensor, training: bool) -> None:
        if not training:
            self._last.kind, self._last.z = _kind(problem), z.detach()
            self._last.scene = self._scene(problem)

    def state(self, problem: Problem, solver: Solver) -> Any:
        made_by = getattr(self._last, 'solved', None)
        if made_by != (_kind(problem), solver) or self._last.state is None:
            return None
        return with_tensors(self._last.state, outside_inference)

    def remember_state(self, problem: Problem, solver: Solver, solution: Solution) -> None:
        failed = (solution.status >= int(Status.DIVERGED)).any()
        self._last.solved = _kind(problem), solver
        self._last.state = None if failed else solution.state

    def reset(self) -> None:
        self._last.__dict__.clear()

    def __getstate__(self) -> dict:
        return dict(history=self.history, motion=self.motion)

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def _kind(problem: Problem) -> tuple:
    """What two batches must share for the state of one to be a start for the other."""
    start = problem.start
    return tuple(start.shape), start.dtype, start.device, tuple(map(tuple, problem.shapes))
