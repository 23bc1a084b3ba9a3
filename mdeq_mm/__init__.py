"""Multiscale Deep Equilibrium Models for OpenMMLab.

Importing the package registers its backbone, neck, layers and hooks, so a config needs only
``custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)``.
"""

import sys

from .compat import allow_mm_globals, check_stack, mend_config_lookup
from .model_index import register_models
from .version import __version__

__all__ = ['__version__', 'register_models']

# Python imports a package before the module that -m names, and meanwhile says '-m' for the program.
_ONLY_CHECKED = sys.argv[:1] == ['-m'] and any('mdeq_mm.check' in word for word in sys.orig_argv)

# The check looks at what is there without it: it must answer where none of this can be imported.
if not _ONLY_CHECKED:
    # First: a doubled or mixed stack fails in ways that do not name it.
    check_stack()
    try:
        from . import hooks, layers, models, registry  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'mdeq_mm cannot be imported, {error}: "python -m mdeq_mm.check" says what of its '
            'environment is missing or broken'
        ) from error
    allow_mm_globals()
    mend_config_lookup()
