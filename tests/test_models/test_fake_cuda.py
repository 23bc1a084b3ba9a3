"""What a GPU would be given, without one: shapes, devices and dtypes on fake CUDA tensors.

A fake tensor has no values, so whatever would wait for the device raises here.
"""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from mdeq_mm.deq import Anderson, FixedPointIteration, LimitedMemoryBroyden, solve

from ..checks import assert_same, needs_fake_cuda

CONFIGS = sorted((Path(__file__).parents[2] / 'configs').glob('mdeq_*.py'))
# Their wrapped projects are optional here; the backbone is that of MDEQ-small.
CONFIGS = [path for path in CONFIGS if path.stem != 'mdeq_small_fpn_coco']
MODES = ((torch.float16, True), (torch.bfloat16, False))


def built(path):
    """The model of a config, two evaluations of f and no tolerance."""
    cfg = Config.fromfile(path)
    model = copy.deepcopy(cfg.model)
    solver = dict(type='LimitedMemoryBroyden', max_iter=2, tol=0)
    model.backbone.solver = solver
    model.backbone.gradient = dict(type='ImplicitGradient', solver=solver)
    # Its draw, and the penalty's backward pass, need values.
    model.backbone.regularizer = None
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return revert_sync_batchnorm(MODELS.build(model))


@needs_fake_cuda
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_model_runs_on_a_gpu_in_every_precision(path, monkeypatch):
    # Without a GPU autocast for one switches itself off.
    monkeypatch.setattr('torch.cuda.amp.common.amp_definitely_not_available', lambda: False)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda: True)
    half = []
    with FakeTensorMode(), torch.device('cuda'):
        model = built(path)
        x = torch.randn(2, 3, 64, 96)
        conv = model.backbone.cell.blocks[0].conv1
        conv.register_forward_hook(lambda *args: half.append(args[-1].dtype))
        maps = []
        model.backbone.register_forward_hook(lambda *args: maps.extend(args[-1]))
        for dtype, training in MODES:
            model.train(training)
            amp = dict(dtype=dtype or torch.float16, enabled=dtype is not None)
            with torch.autocast('cuda', **amp):
                model(x, mode='tensor')
            assert set(half) == {dtype or torch.float32}
            assert {out.device.type for out in maps} == {'cuda'}
            assert {out.dtype for out in maps} == {torch.float32}
            assert [out.shape[1] for out in maps] == list(model.backbone.channels)
            half.clear()
            maps.clear()


@needs_fake_cuda
@pytest.mark.parametrize('channels_last', ['auto', False, True])
def test_memory_format_on_a_gpu_is_the_one_asked_for(channels_last):
    formats = []
    with FakeTensorMode(), torch.device('cuda'):
        net = MODELS.build(
            dict(
                type='MDEQBackbone',
                channels=(16, 16),
                channels_last=channels_last,
                solver=dict(type='Anderson', max_iter=3, tol=0),
            )
        ).eval()
        net.cell.register_forward_pre_hook(
            lambda _, args: formats.append([z.stride(1) == 1 for z in args[0]])
        )
        net(torch.randn(2, 3, 32, 48))
    # Not chosen for a GPU by itself.
    assert formats and all(all(f) == (channels_last is True) for f in formats)


@needs_fake_cuda
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_net_in_half_precision_stays_there(dtype):
    seen = []
    # Fake parameters cannot be converted.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with FakeTensorMode(), torch.device('cuda'):
        cfg = dict(
            type='MDEQBackbone',
            channels=(16, 16),
            solver=dict(type='Anderson', max_iter=3, tol=0),
        )
        net = MODELS.build(cfg)
        torch.set_default_dtype(before)
        net.cell.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].dtype))
        outs = net(torch.randn(2, 3, 32, 48, dtype=dtype))
    assert {out.dtype for out in outs} == set(seen) == {dtype}


class Syncs(TorchFunctionMode):
    """Counts what would make the host wait for the device."""

    WAITS = ('tolist', 'item', '__bool__', '__int__', '__float__', 'nonzero', 'numpy', 'cpu')

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, '__name__', '') in self.WAITS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('kind', [FixedPointIteration, Anderson, LimitedMemoryBroyden])
@pytest.mark.parametrize('check_every', [1, 3, 100])
def test_a_solve_waits_for_the_device_once_every_so_many_evaluations(kind, check_every):
    rate = torch.linspace(0.1, 0.9, 20, dtype=torch.float64)
    solver = kind(max_iter=12, tol=1e-12, check_every=check_every)
    with Syncs() as syncs:
        found = solve(lambda z: rate * torch.cos(z) + 1, torch.zeros(2, 20).double(), solver)
    assert found.num_iter.max() == 12
    assert syncs.count == 12 // check_every


def test_a_late_look_gives_the_same_answer():
    """A sample that is done is frozen at once, however late the host hears of it."""
    rate = torch.linspace(0.1, 0.9, 20, dtype=torch.float64)
    shift = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)

    def f(z):
        return rate * torch.cos(z) + shift

    for kind in (FixedPointIteration, Anderson, LimitedMemoryBroyden):
        early, late = (
            solve(f, torch.zeros(3, 20).double(), kind(max_iter=90, tol=1e-6, check_every=every))
            for every in (1, 7)
        )
        assert early.num_iter.max() < 90
        for name in ('z', 'residual', 'num_iter', 'status'):
            assert_same(getattr(early, name), getattr(late, name), name)


@needs_fake_cuda
def test_a_fixed_budget_on_a_gpu_never_waits():
    for kind in (FixedPointIteration, Anderson, LimitedMemoryBroyden):
        with FakeTensorMode(), torch.device('cuda'):
            solution = solve(torch.cos, torch.zeros(3, 50), kind(max_iter=9, tol=0))
        assert solution.trace.shape == (9, 3) and solution.z.device.type == 'cuda'
