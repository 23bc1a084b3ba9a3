"""Imported, it keeps a Runner from printing its config through yapf.

That takes longer than the training of the tests: conftest.py does it for their own process, this
for the processes that they start.
"""

from yapf.yapflib import yapf_api

yapf_api.FormatCode = lambda text, **_: (text, True)
