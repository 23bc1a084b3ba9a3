"""FSDP in both its forms, in one process: a step gives the same weights as without it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from mdeq_mm.models import MDEQCell
from mdeq_mm.models.cell import ResidualBlock

from . import SOLVERS, contracting, tiny_backbone

HALF = torch.bfloat16
PARTS = dict(whole=(), cell=(MDEQCell,), blocks=(ResidualBlock,))
GRADIENTS = dict(
    implicit=dict(type='ImplicitGradient', solver=dict(type='Anderson', max_iter=20, tol=1e-6)),
    phantom=dict(type='PhantomGradient', steps=2),
)


@pytest.fixture(scope='module', autouse=True)
def one_process(tmp_path_factory):
    meeting = tmp_path_factory.mktemp('group') / 'meeting'
    dist.init_process_group('gloo', init_method=f'file://{meeting}', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def flat_parameters(net, parts, half, use_orig_params):
    return FullyShardedDataParallel(
        net,
        use_orig_params=use_orig_params,
        auto_wrap_policy=ModuleWrapPolicy(set(parts)) if parts else None,
        mixed_precision=MixedPrecision(param_dtype=HALF) if half else None,
        device_id=torch.device('cpu'),
    )


def each_parameter(net, parts, half):
    options = dict(mesh=init_device_mesh('cpu', (dist.get_world_size(),)))
    if half:
        options['mp_policy'] = MixedPrecisionPolicy(param_dtype=HALF)
    for module in net.modules():
        if isinstance(module, parts):
            fully_shard(module, **options)
    return fully_shard(net, **options)


WRAPPERS = dict(
    fsdp1_original=lambda *args: flat_parameters(*args, use_orig_params=True),
    fsdp1_flat=lambda *args: flat_parameters(*args, use_orig_params=False),
    fsdp2=each_parameter,
)


class Model(nn.Module):
    """A backbone as part of a model: where FSDP holds its parameters, it has none of its own."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)


def make(kind, gradient, drop_rate=0.3):
    net = tiny_backbone(
        kind,
        20,
        1e-6,
        stem_norm_cfg=dict(type='GN', num_groups=4),
        gradient=gradient,
        drop_rate=drop_rate,
    )
    return Model(contracting(net)).train()


def step(net):
    """One step of gradient descent; the maps it had, and all weights after it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    torch.manual_seed(1)
    outs = net(torch.randn(2, 3, 12, 12))
    loss = sum((o.float() * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outs)
    loss.backward()
    optimizer.step()
    weights = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    return outs, {key: weight.detach().clone() for key, weight in weights.items()}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('half', [False, True], ids=['float32', 'bf16'])
@pytest.mark.parametrize('parts', PARTS.values(), ids=PARTS)
@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize('gradient', GRADIENTS.values(), ids=GRADIENTS)
def test_a_sharded_net_steps_as_the_plain_one(wrap, parts, half, gradient):
    kind = SOLVERS[1]
    before = make(kind, gradient).state_dict()
    expected, after = step(make(kind, gradient))
    outs, got = step(wrap(make(kind, gradient), parts, half))
    assert {out.dtype for out in outs} == {HALF if half else torch.float32}
    assert got.keys() == after.keys()
    if not half:
        torch.testing.assert_close(outs, expected)
        torch.testing.assert_close(got, after, atol=1e-6, rtol=1e-5)
        return
    for out, wanted in zip(outs, expected):
        error = torch.linalg.vector_norm(out.float() - wanted) / torch.linalg.vector_norm(wanted)
        assert error < 0.05, f'relative error {error}'
    moves = [torch.cat([(w[k] - before[k]).flatten() for k in before]) for w in (got, after)]
    assert torch.cosine_similarity(*moves, 0) > 0.99


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize('kind', SOLVERS)
def test_a_sharded_net_predicts_in_bfloat16(wrap, kind):
    x = torch.randn(2, 3, 12, 12)
    nets = make(kind, GRADIENTS['implicit']), make(kind, GRADIENTS['implicit'])
    with torch.no_grad():
        wanted, outs = nets[0].eval()(x), wrap(nets[1], (), True).eval()(x)
    for out, z in zip(outs, wanted):
        assert out.dtype == HALF
        assert torch.linalg.vector_norm(out.float() - z) / torch.linalg.vector_norm(z) < 0.05
