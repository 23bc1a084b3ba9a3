"""Devices, and arithmetic that can be compared between them."""

import pytest
import torch

from . import DEVICE, MARKS


@pytest.fixture(params=['cpu', pytest.param(DEVICE, marks=MARKS)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def exact_convolutions():
    """float32 in float32: by itself cuDNN rounds to TF32, and chooses algorithms that differ."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = False, True, False
    yield
    cudnn.allow_tf32, cudnn.deterministic, matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def programs():
    """Forget what torch.compile made, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
