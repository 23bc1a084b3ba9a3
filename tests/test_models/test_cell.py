"""f against the formulas of the paper, written out plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Conv2d
from torch.nn.utils.parametrize import is_parametrized

from mdeq_mm.layers import reset_masks
from mdeq_mm.models import MDEQCell

from ..checks import assert_same


def features(channels, size=(12, 10), n=2, dtype=torch.float64):
    h, w = size
    maps = []
    for c in channels:
        maps.append(torch.randn(n, c, h, w, dtype=dtype))
        h, w = (h + 1) // 2, (w + 1) // 2
    return maps


def norm(layer, x, groups=8):
    return F.group_norm(x, groups, layer.weight, layer.bias)


def reference(cell, states, x, resize, act):
    """Eq. 5 and the fusion of §3.2, from the cell's weights alone. Its norms have 8 groups."""
    blocks = []
    for i, (b, z) in enumerate(zip(cell.blocks, states)):
        h = F.relu(norm(b.norm1, F.conv2d(z, b.conv1.weight, padding=1)))
        h = F.conv2d(h, b.conv2.weight, padding=1)
        mask = b.drop.mask(h)
        h = (h if mask is None else h * mask) + (x if i == 0 else 0)
        blocks.append(norm(b.norm3, act(norm(b.norm2, h) + z)))
    outs = []
    for i, fusion in enumerate(cell.fusions):
        total = blocks[i]
        for j, path in fusion.sources.items():
            h = blocks[int(j)]
            if int(j) < i:
                # A convolution and a norm for each halving, ReLU between two of them.
                assert len(path) == 3 * (i - int(j)) - 1
                for k in range(i - int(j)):
                    conv, gn = path[3 * k], path[3 * k + 1]
                    h = norm(gn, F.conv2d(F.relu(h) if k else h, conv.weight, stride=2, padding=1))
            else:
                h = resize(norm(path.norm, F.conv2d(h, path.conv.weight)), total.shape[-2:])
            total = total + h
        # The last norm has half the groups.
        outs.append(norm(fusion.norm, F.conv2d(act(total), fusion.conv.weight), groups=4))
    return outs


@pytest.mark.parametrize('channels', [(8,), (8, 16), (8, 16, 8, 24)])
@pytest.mark.parametrize('size', [(16, 8), (13, 9)])
@pytest.mark.parametrize('smooth', [False, True])
@pytest.mark.parametrize('upsample', ['nearest', 'bilinear'])
def test_cell_is_the_formula(channels, size, smooth, upsample):
    torch.manual_seed(0)
    cell = MDEQCell(channels, expansion=2, upsample=upsample).double()
    cell.smooth = smooth
    for p in cell.parameters():
        torch.nn.init.normal_(p)
    states = features(channels, size)
    x = torch.randn_like(states[0])

    def resize(h, target):
        if upsample == 'nearest':
            return F.interpolate(h, size=target)
        return F.interpolate(h, size=target, mode='bilinear', align_corners=False)

    expected = reference(cell, states, x, resize, F.softplus if smooth else F.relu)
    before = [s.clone() for s in states]
    got = cell(states, x)
    torch.testing.assert_close(states, before, atol=0, rtol=0)
    for g, e, s in zip(got, expected, states):
        assert g.shape == s.shape
        torch.testing.assert_close(g, e)


def test_every_convolution_of_f_has_its_width_and_form():
    """Of 8, 16 and 24 channels, expansion 3; no bias anywhere."""
    cell = MDEQCell((8, 16, 24), expansion=3)
    found = {n: tuple(m.weight.shape) for n, m in cell.named_modules() if isinstance(m, Conv2d)}
    wanted = {}
    for i, c in enumerate((8, 16, 24)):
        wanted[f'blocks.{i}.conv1'] = (3 * c, c, 3, 3)
        wanted[f'blocks.{i}.conv2'] = (c, 3 * c, 3, 3)
        wanted[f'fusions.{i}.conv'] = (c, c, 1, 1)
    normed = set(wanted)
    # Down: the width is the source's until the last convolution. Up: one of 1x1.
    wanted['fusions.1.sources.0.0'] = (16, 8, 3, 3)
    wanted['fusions.2.sources.0.0'] = (8, 8, 3, 3)
    wanted['fusions.2.sources.0.3'] = (24, 8, 3, 3)
    wanted['fusions.2.sources.1.0'] = (24, 16, 3, 3)
    wanted['fusions.0.sources.1.conv'] = (8, 16, 1, 1)
    wanted['fusions.0.sources.2.conv'] = (8, 24, 1, 1)
    wanted['fusions.1.sources.2.conv'] = (16, 24, 1, 1)
    assert found == wanted
    assert {n for n, m in cell.named_modules() if is_parametrized(m, 'weight')} == normed
    assert [name for name in cell.state_dict() if 'conv' in name and 'bias' in name] == []
    plain = MDEQCell((8, 16, 24), expansion=3, weight_norm=False)
    assert [n for n, m in plain.named_modules() if is_parametrized(m)] == []


@pytest.mark.parametrize('fused', [True, False])
def test_dropout_is_of_the_second_convolution_and_not_of_the_injection(fused):
    torch.manual_seed(0)
    cell = MDEQCell((16, 8), expansion=1, drop_rate=0.5).double()
    if not fused:
        # A hook keeps the modules from being computed as one.
        for block in cell.blocks:
            block.norm2.register_forward_hook(lambda *_: None)
    states = features((16, 8))
    x = torch.randn_like(states[0])
    got = cell(states, x)
    expected = reference(cell, states, x, lambda h, size: F.interpolate(h, size=size), F.relu)
    torch.testing.assert_close(got, expected)


def test_dropout_masks_are_one_function_until_reset():
    torch.manual_seed(0)
    cell = MDEQCell((16, 16), expansion=1, drop_rate=0.5)
    states = features((16, 16), dtype=torch.float32)
    x = torch.randn_like(states[0])
    first = cell(states, x)
    assert_same(first, cell(states, x))
    reset_masks(cell)
    assert not torch.equal(first[0], cell(states, x)[0])


def test_layout_of_the_maps_does_not_change_the_values():
    torch.manual_seed(0)
    cell = MDEQCell((8, 16), expansion=2)
    states = features((8, 16), dtype=torch.float32)
    x = torch.randn_like(states[0])
    last = [s.contiguous(memory_format=torch.channels_last) for s in states]
    got = cell(last, x.contiguous(memory_format=torch.channels_last))
    for g, e in zip(got, cell(states, x)):
        assert g.is_contiguous(memory_format=torch.channels_last), g.stride()
        torch.testing.assert_close(g, e, atol=1e-5, rtol=1e-4)
