"""Equilibria of any f: find z = f(z), and let gradients pass through it. Needs PyTorch only."""

from .gradients import (
    Gradient,
    ImplicitGradient,
    JacobianFreeGradient,
    PhantomGradient,
    SharedInverseGradient,
    TruncatedGradient,
)
from .layer import ImplicitLayer, SolverStats, implicit_layers
from .problem import CellProblem, FunctionProblem, Problem, problem_of
from .regularizers import JacobianRegularizer, spectral_radius
from .solvers import (
    Anderson,
    FixedPointIteration,
    LimitedMemoryBroyden,
    Solution,
    Solver,
    Status,
    solve,
)
from .solvers.base import Part
from .start import PreviousStart, ZeroStart

__all__ = [
    'Anderson',
    'CellProblem',
    'FixedPointIteration',
    'FunctionProblem',
    'Gradient',
    'ImplicitGradient',
    'ImplicitLayer',
    'JacobianFreeGradient',
    'JacobianRegularizer',
    'LimitedMemoryBroyden',
    'Part',
    'PhantomGradient',
    'PreviousStart',
    'Problem',
    'SharedInverseGradient',
    'Solution',
    'Solver',
    'SolverStats',
    'Status',
    'TruncatedGradient',
    'ZeroStart',
    'implicit_layers',
    'problem_of',
    'solve',
    'spectral_radius',
]
