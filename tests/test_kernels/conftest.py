"""The implementations that one test is run for."""

import pytest
import torch

from mdeq_mm.kernels import compiled, extension, formulas, resolve


def need_cpp():
    """Skip where the C++ operations cannot be built."""
    if resolve('cpp', 'cpu') != 'cpp':
        pytest.skip(f'no C++ operations: {extension.load()}')


@pytest.fixture(params=['native', 'cpp', 'formulas'])
def kernel(request, monkeypatch):
    """``kernel`` of an operation. The formulas of ``'compiled'`` run here as they are written."""
    if request.param == 'cpp':
        need_cpp()
    if request.param != 'formulas':
        return request.param
    monkeypatch.setattr(compiled, '_compiled', lambda name, *key: getattr(formulas, name))
    return 'compiled'


@pytest.fixture
def cpp():
    """``'cpp'``, for what is particular to it."""
    need_cpp()
    return 'cpp'


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
