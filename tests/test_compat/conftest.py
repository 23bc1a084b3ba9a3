"""Python in a process of its own, without some modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

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

    def run(hidden, *arguments, folder=tmp_path):
        (tmp_path / 'sitecustomize.py').write_text(BLOCKER)
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        env = {**os.environ, 'PYTHONPATH': path, 'HIDDEN': hidden}
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True
        )

    return run
