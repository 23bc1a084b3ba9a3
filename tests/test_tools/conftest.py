import importlib.util
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def load_tool(monkeypatch):
    """Give a function that imports a script of tools/ as Python would run it."""

    def load(name: str):
        path = REPO / 'tools' / f'{name}.py'
        # A script finds its neighbours beside it.
        monkeypatch.syspath_prepend(str(path.parent))
        spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
