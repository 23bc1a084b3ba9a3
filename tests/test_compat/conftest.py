"""Python in a process of its own, without some modules."""

import os

import pytest

from ..processes import ROOT, run_python

# Runs before a program's first line, and hides the modules named in HIDDEN from it.
BLOCKER = """
import os
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in os.environ['HIDDEN'].split():
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Hide())
"""


@pytest.fixture
def python_without(tmp_path):
    """Runs Python in a process of its own that cannot import some modules."""

    def run(hidden, *arguments, folder=tmp_path, expect=0):
        (tmp_path / 'sitecustomize.py').write_text(BLOCKER)
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        env = {'PYTHONPATH': path, 'HIDDEN': hidden}
        return run_python(*arguments, cwd=folder, env=env, expect=expect)

    return run
