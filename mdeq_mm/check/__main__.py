"""The entry point of ``python -m mdeq_mm.check``, which works where ``import mdeq_mm`` fails.

Python imports a package before the module in it that ``-m`` names. If that import fails with an
ImportError whose ``name`` is the package's own, ``-m`` still runs the module, provided that it is
loaded already; ``mdeq_mm/__init__.py`` therefore imports ``mdeq_mm.check`` first, and its errors
carry its name.
"""

import sys

from . import main

sys.exit(main())
