"""Fixtures for every test."""

import pytest
import torch


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
    """Settings that tools make for their whole process do not affect the next test."""
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
