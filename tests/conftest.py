"""What every test shares."""

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load_tool(monkeypatch):
    """Give a function that imports a script of tools/ as Python would run it."""

    def load(name: str):
        path = ROOT / 'tools' / f'{name}.py'
        # A script finds its neighbours beside it.
        monkeypatch.syspath_prepend(str(path.parent))
        spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(autouse=True)
def one_thread():
    """The maps here are tiny: waking a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def plain_config_dump(monkeypatch):
    """A Runner prints its config through yapf, which costs more than these tests' training."""
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    """What tools set for their whole process does not reach the next test."""
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
