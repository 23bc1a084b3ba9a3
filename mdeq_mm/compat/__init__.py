"""Everything that depends on the versions of other packages, one file per subject.

Nothing here imports torch or OpenMMLab before it is called.
"""

from .loading import (
    UnsafeCheckpointError,
    allow_mm_globals,
    force_safe_loading,
    verify_checkpoint,
)
from .patches import (
    allow_repeated_backward,
    patch_class_weights,
    patch_config_lookup,
    patch_missing_onedl,
    patch_norm_fusion,
)
from .stack import (
    PACKAGES,
    Package,
    Problem,
    can_import,
    check_stack,
    find_problem,
    has_openmmlab,
    has_operators,
    installed_of,
    installed_version,
    operators_command,
)

__all__ = [
    'PACKAGES',
    'Package',
    'Problem',
    'UnsafeCheckpointError',
    'allow_mm_globals',
    'allow_repeated_backward',
    'can_import',
    'check_stack',
    'find_problem',
    'force_safe_loading',
    'has_openmmlab',
    'has_operators',
    'installed_of',
    'installed_version',
    'patch_class_weights',
    'patch_config_lookup',
    'patch_missing_onedl',
    'patch_norm_fusion',
    'operators_command',
    'verify_checkpoint',
]
