from .dropout_hook import VariationalDropoutHook
from .solver_stats_hook import SolverStatsHook
from .warmup_hook import MDEQWarmupHook

__all__ = ['MDEQWarmupHook', 'SolverStatsHook', 'VariationalDropoutHook']
