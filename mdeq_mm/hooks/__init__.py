from .checkpoint_hook import MDEQCheckpointHook
from .nonfinite_hook import NonFiniteGradientHook
from .regularizer_hook import MDEQRegularizerHook
from .seed_hook import IterationSeedHook
from .solver_stats_hook import SolverStatsHook
from .warmup_hook import MDEQWarmupHook

__all__ = [
    'IterationSeedHook',
    'MDEQCheckpointHook',
    'MDEQRegularizerHook',
    'MDEQWarmupHook',
    'NonFiniteGradientHook',
    'SolverStatsHook',
]
