"""The implicit layer, and the one place where multiscale features become a flat state."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .build import build_part
from .gradients import Gradient
from .options import check_int
from .solvers import Solution, Solver, Status, solve
from .solvers.base import Function

Shape = Tuple[int, int, int]


def pack(features: Sequence[Tensor], channels_last: bool = False) -> Tensor:
    """[(N, Ci, Hi, Wi)] -> (N, D), D the sum of CiHiWi.

    Args:
        features (Sequence[Tensor]): Feature maps of one batch.
        channels_last (bool): Lay each scale out as (Hi, Wi, Ci), which costs no transposition
            where the features are in that memory format.
    """
    if channels_last:
        features = [feature.permute(0, 2, 3, 1) for feature in features]
    return torch.cat([feature.flatten(1) for feature in features], dim=1)


def unpack(z: Tensor, shapes: Sequence[Shape], channels_last: bool = False) -> List[Tensor]:
    """(N, D) -> [(N, Ci, Hi, Wi)], the inverse of :func:`pack`, as views."""
    features, start = [], 0
    for c, h, w in shapes:
        part = z[:, start : start + c * h * w]
        start += c * h * w
        if channels_last:
            features.append(part.unflatten(1, (h, w, c)).permute(0, 3, 1, 2))
        else:
            features.append(part.unflatten(1, (c, h, w)))
    if start != z.shape[1]:
        raise ValueError(f'{z.shape[1]} values a sample do not fill the shapes {list(shapes)}.')
    return features


@dataclass
class SolverStats:
    """What a solve did, (N,) each: relative residual, evaluations of f, Status codes."""

    residual: Tensor
    num_iter: Tensor
    status: Tensor

    @classmethod
    def of(cls, solution: Solution) -> 'SolverStats':
        return cls(solution.residual, solution.num_iter, solution.status)

    def summary(self) -> Dict[str, float]:
        """Means over the batch as plain floats. Waits for the device."""
        converged = (self.status == int(Status.CONVERGED)).float().mean()
        failed = (self.status >= int(Status.DIVERGED)).float().sum()
        values = torch.stack(
            [self.num_iter.float().mean(), self.residual.float().mean(), converged, failed]
        )
        return dict(zip(('nfe', 'residual', 'converged', 'failed'), values.tolist()))


class ImplicitLayer(nn.Module):
    """A solver for the equilibrium and a way for the gradient to pass it.

    Args:
        solver (dict | Solver): Finds z* in the forward pass.
        gradient (dict | Gradient): Carries gradients past z*.
        unrolled_layers (int): If positive, apply f so many times and backpropagate through all
            of them, instead of solving: the warm-up of the paper (§3.3), and explicit nets.

    Attributes:
        forward_stats, backward_stats (SolverStats | None): What the last solve of either kind
            did; None where none took place. They hold no graph.
    """

    def __init__(
        self,
        solver: Union[Dict[str, Any], Solver],
        gradient: Union[Dict[str, Any], Gradient],
        unrolled_layers: int = 0,
    ) -> None:
        super().__init__()
        self.solver = build_part(solver, Solver)
        self.gradient = build_part(gradient, Gradient)
        self.unrolled_layers = check_int('ImplicitLayer', 'unrolled_layers', unrolled_layers, 0)
        self.forward_stats: Optional[SolverStats] = None
        self.backward_stats: Optional[SolverStats] = None

    def forward(self, f: Function, z0: Tensor) -> Tensor:
        """``f(z*)``, (N, D), in training and evaluation alike."""
        self.forward_stats = self.backward_stats = None
        # What f computes from parametrized weights is the same at each call: once is enough.
        if self.unrolled_layers:
            with parametrize.cached():
                z = z0
                for _ in range(self.unrolled_layers):
                    z = f(z)
                return z
        with parametrize.cached():
            solution = solve(f, z0, self.solver, keep_state=self.gradient.needs_state)
        self.forward_stats = SolverStats.of(solution)
        # Weights cached without grad, by autocast too, would cut the parameters off.
        torch.clear_autocast_cache()
        with parametrize.cached():
            return self.gradient(f, solution, self._report_backward)

    def _report_backward(self, solution: Solution) -> None:
        self.backward_stats = SolverStats.of(solution)

    def extra_repr(self) -> str:
        return f'solver={self.solver}, gradient={type(self.gradient).__name__}'
