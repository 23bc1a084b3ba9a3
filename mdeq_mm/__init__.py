"""Multiscale Deep Equilibrium Models for OpenMMLab.

Importing the package registers its backbone, neck, layers and hooks, so a config needs only
``custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)``. Where neither mmengine
nor mmcv is installed it gives :mod:`mdeq_mm.deq` alone, which needs torch only.
"""

# Loaded before anything can fail: see mdeq_mm/check/__main__.py.
from . import check  # noqa: F401
from .compat import (
    allow_mm_globals,
    check_stack,
    has_openmmlab,
    patch_config_lookup,
    patch_missing_onedl,
    patch_norm_fusion,
)
from .model_index import register_models
from .threads import bound_spinning
from .version import __version__

__all__ = ['__version__', 'register_models']

# Before torch is loaded below.
bound_spinning()

if has_openmmlab():
    # First: a doubled or mixed stack fails later, with errors that do not name the cause.
    check_stack()
try:
    if has_openmmlab():
        from . import hooks, layers, models, optim, registry  # noqa: F401

        allow_mm_globals()
        patch_config_lookup()
        patch_missing_onedl()
        patch_norm_fusion()
    else:
        from . import deq  # noqa: F401
except Exception as error:  # an incompatible package may raise anything
    raise ImportError(
        f'mdeq_mm cannot be imported ({type(error).__name__}: {error}): "python -m mdeq_mm.check" '
        'says what is missing or broken in this environment',
        name=__name__,
    ) from error
