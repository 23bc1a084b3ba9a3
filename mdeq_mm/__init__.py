"""Multiscale Deep Equilibrium Models for OpenMMLab.

Importing the package registers its backbone, neck, layers and hooks, so a config needs only
``custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)``.
"""

from .compat import check_stack
from .version import __version__

# Before anything that imports mmengine: a doubled or mixed stack fails in ways that do not name it.
check_stack()

from . import hooks, layers, models  # noqa: E402, F401
from .model_index import register_models  # noqa: E402

__all__ = ['__version__', 'register_models']
