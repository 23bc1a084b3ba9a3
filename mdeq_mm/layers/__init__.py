from .conv import MDEQConv2d
from .group_norm import MDEQGroupNorm, build_norm, check_groups, fusible, has_hooks, is_group_norm
from .scale_output import ScaleOutput
from .variational_dropout import VariationalDropout2d, reset_masks

__all__ = [
    'MDEQConv2d',
    'MDEQGroupNorm',
    'ScaleOutput',
    'VariationalDropout2d',
    'build_norm',
    'check_groups',
    'fusible',
    'has_hooks',
    'is_group_norm',
    'reset_masks',
]
