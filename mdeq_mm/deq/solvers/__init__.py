"""Find z with f(z) = z. Nothing here is specific to vision or to OpenMMLab."""

from .anderson import Anderson
from .base import Solution, Solver, Status, solve
from .broyden import LimitedMemoryBroyden
from .fixed_point import FixedPointIteration

__all__ = [
    'Anderson',
    'FixedPointIteration',
    'LimitedMemoryBroyden',
    'Solution',
    'Solver',
    'Status',
    'solve',
]
