"""f is one function, whatever computes its norms."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from mdeq_mm.deq import CellProblem
from mdeq_mm.layers import MDEQGroupNorm
from mdeq_mm.models import MDEQBackbone, MDEQCell

from ..checks import OLD_TORCH, assert_same


def maps(channels, size, n=2, dtype=torch.float64):
    h, w = size
    found = []
    for c in channels:
        found.append(torch.randn(n, c, h, w, dtype=dtype).requires_grad_())
        h, w = (h + 1) // 2, (w + 1) // 2
    return found


def computed(cell, states, x):
    """f, and its gradients for states, injection and parameters, with masks drawn alike."""
    torch.manual_seed(1)
    for module in cell.modules():
        if hasattr(module, 'reset'):
            module.reset()
    outs = cell(states, x)
    weights = [torch.randn(out.shape, dtype=torch.float64).to(out) for out in outs]
    total = sum((out * v).sum() for out, v in zip(outs, weights))
    return [*outs, *torch.autograd.grad(total, [*states, x, *cell.parameters()])]


def twins(kernel, channels, dtype=torch.float64, smooth=False, **options):
    """The same f by ``kernel`` and by torch, with parameters that matter."""
    torch.manual_seed(0)
    cell = MDEQCell(channels, expansion=2, norm_kernel=kernel, **options).to(dtype)
    for p in cell.parameters():
        torch.nn.init.normal_(p)
    cell.smooth = smooth
    native = MDEQCell(channels, expansion=2, norm_kernel='native', **options).to(dtype)
    native.load_state_dict(cell.state_dict())
    native.smooth = smooth
    return cell, native


@pytest.mark.parametrize('channels, size', [((8,), (4, 5)), ((8, 16, 8), (9, 7))])
@pytest.mark.parametrize('smooth', [False, True])
@pytest.mark.parametrize('upsample', ['nearest', 'bilinear'])
def test_values_and_gradients(kernel, channels, size, smooth, upsample):
    cell, native = twins(kernel, channels, smooth=smooth, upsample=upsample, drop_rate=0.4)
    states = maps(channels, size)
    x = torch.randn_like(states[0]).requires_grad_()
    for a, b in zip(computed(cell, states, x), computed(native, states, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_smallest_images_and_none(kernel):
    cell, native = twins(kernel, (8, 16))
    for n, size in ((2, (1, 1)), (1, (2, 1)), (0, (4, 4))):
        states = maps((8, 16), size, n)
        x = torch.randn_like(states[0]).requires_grad_()
        for a, b in zip(computed(cell, states, x), computed(native, states, x), strict=True):
            # Groups of a few pixels make large numbers of rounding errors.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_norms_without_groups_are_called_as_they_are(kernel):
    cell, native = twins(kernel, (8, 16), norm_cfg=dict(type='IN', affine=True))
    states = maps((8, 16), (6, 8))
    x = torch.randn_like(states[0]).requires_grad_()
    for a, b in zip(computed(cell, states, x), computed(native, states, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    'path',
    ['blocks.0.norm1', 'blocks.1.norm2', 'blocks.0.norm3', 'fusions.0.norm']
    + ['fusions.1.sources.0.1', 'fusions.0.sources.1.norm', 'blocks.0.drop'],
)
def test_a_hook_sees_and_changes_what_its_module_returns(kernel, path):
    cell, native = twins(kernel, (8, 16), drop_rate=0.3)
    states = maps((8, 16), (6, 8))
    x = torch.randn_like(states[0]).requires_grad_()
    plain = computed(cell, states, x)
    for net in (cell, native):
        net.get_submodule(path).register_forward_hook(lambda *args: 2 * args[-1] + 0.1)
    hooked = computed(cell, states, x)
    for a, b in zip(hooked, computed(native, states, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert not all(torch.allclose(a, b) for a, b in zip(hooked[:2], plain[:2]))


def test_a_subclass_of_the_norm_is_called(kernel):
    @MODELS.register_module(name='TwiceTheNorm')
    class Twice(MDEQGroupNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    try:
        cfg = dict(type='TwiceTheNorm', num_groups=4)
        cell, native = twins(kernel, (8, 16), norm_cfg=cfg)
    finally:
        MODELS.module_dict.pop('TwiceTheNorm')
    other = MDEQCell((8, 16), expansion=2, norm_kernel=kernel).double()
    other.load_state_dict(cell.state_dict())
    states = maps((8, 16), (6, 8))
    x = torch.randn_like(states[0])
    a, b, c = (net(states, x)[0] for net in (cell, native, other))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, c)


def test_under_autocast_f_is_that_of_bfloat16(kernel):
    """Both differ from f in float32 by no more than rounding to bfloat16."""
    cell, native = twins(kernel, (8, 16), dtype=torch.float32)
    states = maps((8, 16), (9, 7), dtype=torch.float32)
    x = torch.randn_like(states[0])

    def run(cell, enabled=True):
        problem = CellProblem(cell, x, channels_last=True)
        z = torch.cat([s.detach().permute(0, 2, 3, 1).flatten(1) for s in states], 1)
        z.requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out = problem(z)
        assert out.dtype == torch.float32
        return out, torch.autograd.grad(out, z, torch.ones_like(out))[0]

    for exact, ours, theirs in zip(run(native, False), run(cell), run(native), strict=True):
        error, other = ((y - exact).norm() / exact.norm() for y in (ours, theirs))
        assert 0 < error < 1.5 * other + 1e-3


def test_the_penalty_on_the_jacobian_has_one_gradient(kernel):
    """Double backward goes through torch's operators."""
    cell, native = twins(kernel, (8, 16))
    states = maps((8, 16), (6, 5))
    x = torch.randn_like(states[0])

    def gradients(cell):
        outs = cell(states, x)
        torch.manual_seed(2)
        v = [torch.randn(out.shape, dtype=out.dtype) for out in outs]
        vjp = torch.autograd.grad(outs, states, v, create_graph=True)
        penalty = sum(g.square().sum() for g in vjp)
        # The last shifts have no part in it, which torch 2.9 says by None.
        return torch.autograd.grad(penalty, list(cell.parameters()), materialize_grads=OLD_TORCH)

    for a, b in zip(gradients(cell), gradients(native), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_option_reaches_every_norm():
    net = MDEQBackbone(channels=(8, 16), norm_kernel='native')
    norms = [m for m in net.cell.modules() if isinstance(m, MDEQGroupNorm)]
    assert len(norms) == 10 and {norm.kernel for norm in norms} == {'native'}
    assert {fusion.kernel for fusion in net.cell.fusions} == {'native'}
    with pytest.raises(ValueError, match="norm_kernel must be one of .*, got 'nativ'.*'native'"):
        MDEQBackbone(channels=(8, 16), norm_kernel='nativ')


def test_a_copy_computes_alike(kernel):
    cell, _ = twins(kernel, (8, 16))
    states = maps((8, 16), (6, 8))
    x = torch.randn_like(states[0])
    for a, b in zip(cell(states, x), copy.deepcopy(cell)(states, x)):
        assert_same(a, b)
