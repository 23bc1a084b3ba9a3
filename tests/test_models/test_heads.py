"""What stands behind the backbone in MM: CAM tools, heads that view(), fused norms, widths."""

import copy

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils.dl_utils import is_norm

import mdeq_mm  # noqa: F401

from ..checks import assert_same

TINY = dict(
    type='MDEQBackbone',
    channels=(8, 16),
    expansion=1,
    stem_strides=(2,),
    norm_cfg=dict(type='GN', num_groups=4),
    solver=dict(type='Anderson', max_iter=4),
)


def test_the_last_norm_is_called_once_with_the_last_map_and_its_gradient():
    """CAM tools pair one activation with one gradient, of the last norm where none is named."""
    net = MODELS.build(dict(TINY)).eval()
    *_, (name, layer) = [(n, m) for n, m in net.named_modules() if is_norm(m)]
    assert name == 'outputs.1'
    activations, gradients = [], []

    def watch(module, args, out):
        activations.append(out.detach().clone())
        out.register_hook(gradients.append)

    layer.register_forward_hook(watch)
    maps = net(torch.randn(1, 3, 16, 16))
    weight = torch.randn_like(maps[1])
    (maps[0].sum() + (weight * maps[1]).sum()).backward()
    assert len(activations) == len(gradients) == 1
    assert_same(activations[0], maps[1].detach())
    assert_same(gradients[0], weight)


def test_each_returned_scale_has_its_layer_without_a_weight():
    net = MODELS.build(dict(TINY, out_indices=(1,))).eval()
    seen = []
    net.outputs[0].register_forward_hook(lambda module, args, out: seen.append(out))
    (out,) = net(torch.randn(1, 3, 16, 16))
    assert seen[0] is out and len(net.outputs) == 1
    assert not [key for key in net.state_dict() if key.startswith('outputs')]


HRNET = dict(
    type='HRNet',
    extra={
        f'stage{i}': dict(
            num_modules=1,
            num_branches=i,
            block='BOTTLENECK' if i == 1 else 'BASIC',
            num_blocks=(1,) * i,
            num_channels=(8, 16, 16, 16)[:i],
        )
        for i in range(1, 5)
    },
)


@pytest.mark.parametrize('backbone', [TINY, HRNET], ids=lambda cfg: cfg['type'])
def test_a_head_that_views_its_maps(backbone):
    pytest.importorskip('mmseg.models')
    head = dict(type='DMHead', in_channels=16, in_index=1, channels=8, num_classes=3)
    with DefaultScope.overwrite_default_scope('mmseg'), torch.no_grad():
        net = MODELS.build(dict(backbone))
        # HRNet's train(), which eval() calls, returns nothing.
        net.eval()
        maps = net(torch.randn(2, 3, 64, 64))
        assert [m.is_contiguous() for m in maps] == [True] * len(maps)
        assert MODELS.build(head)(maps).shape[:2] == (2, 3)


def test_maps_are_channels_last_where_that_is_asked_for():
    net = MODELS.build(dict(TINY, channels_last=True)).eval()
    for m in net(torch.randn(2, 3, 16, 16)):
        assert m.is_contiguous(memory_format=torch.channels_last), m.stride()


@pytest.mark.parametrize('channels_last', ['auto', True, False])
@pytest.mark.parametrize('size', [(16, 16), (1, 1)])
def test_every_map_has_memory_of_its_own(channels_last, size):
    """A head may work in place on one, though all were parts of one state."""
    net = MODELS.build(dict(TINY, channels_last=channels_last)).eval()
    kept = []
    net.implicit.register_forward_hook(lambda layer, args, out: kept.extend(out))
    with torch.no_grad():
        maps = net(torch.randn(1, 3, *size))
    assert len(kept) == len(maps) == 2
    memory = {m.untyped_storage().data_ptr() for m in (*maps, *kept)}
    # Both scales of the state may be parts of one tensor.
    assert len(memory) >= 3, memory
    for m in maps:
        assert m.untyped_storage().nbytes() == m.numel() * m.element_size()


def test_norms_are_fused_into_the_convolutions_of_the_neck():
    neck = dict(type='MDEQFuseNeck', in_channels=(8, 16), head_channels=(2, 4), out_channels=20)
    neck = MODELS.build(neck)
    maps = [torch.randn(4, 8, 8, 8), torch.randn(4, 16, 4, 4)]
    # Running statistics of its own.
    neck.train()(maps)
    neck.eval()
    fused = fuse_conv_bn(copy.deepcopy(neck))
    assert not [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    torch.testing.assert_close(fused(maps)[0], neck(maps)[0], atol=1e-4, rtol=1e-4)
