from .conv import MDEQConv2d
from .group_norm import MDEQGroupNorm, build_norm, check_groups, fusible, has_hooks
from .variational_dropout import VariationalDropout2d, reset_masks

__all__ = [
    'MDEQConv2d',
    'MDEQGroupNorm',
    'VariationalDropout2d',
    'build_norm',
    'check_groups',
    'fusible',
    'has_hooks',
    'reset_masks',
]
