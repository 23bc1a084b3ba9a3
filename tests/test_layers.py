"""Dropout, normalization and weight norm, inside and outside of an MDEQ."""

import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from mdeq_mm.deq import Anderson, ImplicitLayer, PhantomGradient
from mdeq_mm.layers import (
    MDEQConv2d,
    MDEQGroupNorm,
    VariationalDropout2d,
    build_norm,
    reset_masks,
)

from .checks import assert_same


class TwoScales(nn.Module):
    """Dropout of one module on maps of 8 channels and of 4, which see each other's mean."""

    def __init__(self, checkpointed):
        super().__init__()
        self.drop = VariationalDropout2d(0.5)
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.checkpointed = checkpointed
        self.masks = []
        self.drop.register_forward_hook(lambda drop, x, _: self.masks.append(drop.mask(*x)))

    def forward(self, states):
        if self.checkpointed:
            return checkpoint(self.body, states, use_reentrant=False)
        return self.body(states)

    def body(self, states):
        self.masks.clear()
        return self.mixed([self.drop(torch.cos(z)) for z in states])

    def mixed(self, dropped):
        means = [z.mean((1, 2, 3), keepdim=True) for z in dropped]
        return [self.weight * (z + mean) for z, mean in zip(dropped, reversed(means))]

    def plain(self, states, masks):
        return self.mixed([mask * torch.cos(z) for z, mask in zip(states, masks)])


class TestVariationalDropout2d:
    def test_mask_lasts_until_reset_and_drops_whole_channels(self):
        drop = MODELS.build(dict(type='VariationalDropout2d', drop_rate=0.5))
        x = torch.ones(4, 64, 3, 5)
        first, second = drop(x), drop(x)
        assert_same(first, second)
        assert set(first.unique().tolist()) == {0.0, 2.0}
        assert (first == first[..., :1, :1]).all()
        assert not torch.equal(first[0], first[1])
        drop.reset()
        assert not torch.equal(drop(x), first)

    def test_mean_is_kept(self):
        drop = VariationalDropout2d(0.3)
        assert drop(torch.ones(64, 512, 1, 1)).mean().item() == pytest.approx(1, abs=0.02)

    def test_evaluation_and_zero_rate_are_the_identity(self):
        x = torch.randn(2, 3, 4, 4)
        assert VariationalDropout2d(0.5).eval()(x) is x
        assert VariationalDropout2d(0.0)(x) is x

    def test_new_batch_size_draws_a_new_mask(self):
        drop = VariationalDropout2d(0.5)
        drop(torch.ones(4, 8, 2, 2))
        assert drop(torch.ones(3, 8, 2, 2)).shape == (3, 8, 2, 2)

    def test_gradient_uses_the_mask_of_its_forward(self):
        drop = VariationalDropout2d(0.5)
        x = torch.ones(2, 32, 2, 2, requires_grad=True)
        out = drop(x)
        drop.reset()
        drop(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert_same(grad, out.detach())

    def test_mask_follows_the_dtype_and_stays_out_of_checkpoints(self):
        drop = VariationalDropout2d(0.5)
        assert drop(torch.ones(2, 8, 1, 1)).dtype == torch.float32
        assert drop(torch.ones(2, 8, 1, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert not drop.state_dict()

    def test_reset_masks_reaches_every_layer(self):
        net = nn.Sequential(VariationalDropout2d(0.5), nn.Sequential(VariationalDropout2d(0.5)))
        x = torch.ones(2, 256, 1, 1)
        before = net(x)
        assert_same(net(x), before)
        reset_masks(net)
        assert not torch.equal(net(x), before)

    @pytest.mark.parametrize('bind', [True, False], ids=['module', 'closure'])
    @pytest.mark.parametrize('checkpointed', [False, True])
    def test_one_module_at_two_scales_of_f_has_a_mask_for_each(self, bind, checkpointed):
        f = TwoScales(checkpointed).double()
        layer = ImplicitLayer(Anderson(max_iter=60, tol=1e-11), PhantomGradient(steps=3))
        start = [torch.ones(2, 8, 3, 3).double(), torch.ones(2, 4, 2, 2).double()]
        torch.manual_seed(0)
        z = layer(f if bind else lambda z: f(z), start)
        assert layer.forward_stats.summary()['converged'] == 1
        (got,) = torch.autograd.grad(sum(part.sum() for part in z), f.weight)
        # The same masks by hand: the layer drew them first.
        masks = [mask.double() for mask in f.masks]
        value = [part.detach() for part in z]
        for _ in range(3):
            new = f.plain(value, masks)
            value = [0.5 * old + 0.5 * part for old, part in zip(value, new)]
        (wanted,) = torch.autograd.grad(sum(part.sum() for part in value), f.weight)
        torch.testing.assert_close(got, wanted)

    @pytest.mark.parametrize('rate', [-0.1, 1, 1.5, 'half'])
    def test_rate_outside_the_unit_interval_is_refused(self, rate):
        with pytest.raises(ValueError, match=r'drop_rate .* \[0, 1\)'):
            VariationalDropout2d(rate)

    def test_unknown_option_lists_the_valid_one(self):
        with pytest.raises(TypeError, match='drop_rate'):
            MODELS.build(dict(type='VariationalDropout2d', p=0.5))


class TestGroupNorm:
    def test_same_function_and_keys_as_torch(self):
        ours, theirs = MDEQGroupNorm(24, 8), nn.GroupNorm(8, 24)
        nn.init.normal_(ours.weight)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 24, 5, 6)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_registered_for_any_norm_cfg(self):
        name, layer = build_norm_layer(dict(type='MDEQGroupNorm', num_groups=4), 16)
        assert isinstance(layer, MDEQGroupNorm) and layer.num_groups == 4 and 'gn' in name

    def test_autocast_keeps_low_precision_maps_but_full_precision_statistics(self):
        layer = MDEQGroupNorm(16, 4)
        x = (torch.randn(2, 16, 32, 32) + 3).to(torch.bfloat16)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            got = layer(x)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), layer(x.float()), atol=3e-2, rtol=2e-2)

    @pytest.mark.parametrize('num_groups', [8, 5, 0])
    def test_groups_that_do_not_divide_list_those_that_do(self, num_groups):
        with pytest.raises(ValueError, match=r'\[1, 2, 3, 4, 6, 12\]'):
            MDEQGroupNorm(12, num_groups)

    def test_post_fusion_norm_has_half_the_groups(self):
        cfg = dict(type='GN', num_groups=8)
        assert build_norm(cfg, 32).num_groups == 8
        assert build_norm(cfg, 32, halve_groups=True).num_groups == 4
        assert cfg == dict(type='GN', num_groups=8)

    def test_affine_free_and_other_norms_pass_through(self):
        assert build_norm(dict(type='GN', num_groups=8, affine=False), 32).weight is None
        assert isinstance(build_norm(dict(type='IN'), 32), nn.InstanceNorm2d)

    @pytest.mark.parametrize('kind', ['BN', 'SyncBN'])
    def test_batch_norm_in_f_is_refused(self, kind):
        with pytest.raises(ValueError, match='batch statistics'):
            build_norm(dict(type=kind), 32)


@pytest.mark.parametrize('size', [(7, 1), (1, 1), (1, 7), (6, 5)])
def test_strided_convolution_is_right_on_the_narrowest_maps(size):
    """Memory that nobody wrote is seldom zero where large values have just been freed."""
    plain = nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False).double()
    ours = MDEQConv2d(24, 48, 3, stride=2, padding=1, bias=False)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 24, *size).contiguous(memory_format=torch.channels_last)
    wanted = plain(x.double())
    (expected,) = torch.autograd.grad(wanted.sum(), plain.weight)
    for _ in range(8):
        torch.full((1 << 16,), 1e30)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = ours(x)
        torch.testing.assert_close(out.double(), wanted, atol=0.02, rtol=0.02)
        (grad,) = torch.autograd.grad(out.float().sum(), ours.weight)
        torch.testing.assert_close(grad.double(), expected, atol=0.1, rtol=0.02)
