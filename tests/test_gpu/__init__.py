"""Tests that need a GPU, and tests that run on CPU and GPU.

Tests that take ``device`` run on the CPU as well, in the ordinary suite, so that they are known to
work before a GPU is there. `make gpu` runs the others, and these on the GPU.
"""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..checks import assert_finite
from ..test_robustness import contracting, tiny_backbone

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
DEVICE = 'cuda'
#: Marks of a test that needs a GPU.
MARKS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='torch finds no GPU'),
)


def on_gpu(test):
    """Decorator of a test that has nothing to do on a CPU."""
    for mark in MARKS:
        test = mark(test)
    return test


def image(device: str, size: int = 12, batch: int = 2, dtype: torch.dtype = torch.float32):
    """(N, 3, size, size), the same values on each device."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=dtype).to(device)


def backbone(device: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A small net whose f contracts, with the same weights on each device."""
    return contracting(tiny_backbone(**options)).to(device, dtype)


def loss_of(maps) -> Tensor:
    """A scalar in which each value of the maps has another weight."""
    weights = (
        torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view(z.shape).to(z.device)
        for z in maps
    )
    return sum((z.double() * weight).sum() for z, weight in zip(maps, weights))


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the net's parameters, by name."""
    net.zero_grad()
    loss_of(net(x)).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_near(got, wanted, tolerance: float) -> None:
    """Tensors in the same structure differ by at most a share of their length."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        got, wanted = list(got.values()), list(wanted.values())
    for a, b in zip(got, wanted, strict=True):
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        assert_finite(a)
        assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b)


def small_config(name: str) -> Config:
    """A config with its widths cut down; its structure stays."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    solver = dict(max_iter=4, tol=0, memory=3)
    # Norms of several channels each: one of a single channel hides the length of a weight.
    norm_cfg = dict(type='GN', num_groups=4)
    cfg.model.backbone.update(channels=[8, 16, 24, 32], expansion=1, norm_cfg=norm_cfg)
    cfg.model.backbone.solver.update(solver)
    cfg.model.backbone.gradient.solver.update(solver)
    return cfg


def built(cfg: Config, sync: bool = False) -> nn.Module:
    """The model of a config, initialized, with SyncBN only if asked for."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(copy.deepcopy(cfg.model))
        model.init_weights()
    return model if sync else revert_sync_batchnorm(model)
