"""Each operation agrees with its definition, whatever computes it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from mdeq_mm.kernels import Norm, Term, norm_relu, residual_norms, sum_rectify
from mdeq_mm.kernels.norms import native_norm

from ..checks import assert_same
from .cases import NormRelu, NormReluConv, Residual, Sum, mapped, maps, results, tensors

# n, c, h, w, groups: odd sizes, one pixel, one channel, groups of one channel, one group, channels
# that fill registers and that do not, maps of more than one block.
SHAPES = [
    (2, 6, 5, 7, 3),
    (3, 24, 8, 8, 8),
    (1, 5, 3, 4, 5),
    (2, 1, 4, 3, 1),
    (2, 32, 2, 1, 1),
    (1, 48, 40, 41, 8),
    (4, 3, 9, 1, 1),
]
KINDS = [
    (NormRelu, {}),
    (NormRelu, dict(relu=False)),
    (NormReluConv, {}),
    (Residual, {}),
    (Residual, dict(injected=False)),
    (Residual, dict(dropped=False)),
    (Residual, dict(injected=False, dropped=False, smooth=True)),
    (Sum, {}),
    (Sum, dict(smooth=True)),
]
IDS = ['-'.join([kind.__name__, *options]) for kind, options in KINDS]
every_kind = pytest.mark.parametrize('kind, options', KINDS, ids=IDS)


@every_kind
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('affine', [True, False])
def test_values_and_gradients_are_those_of_the_definition(kernel, kind, options, shape, affine):
    case = kind.random(*shape, affine=affine, **options)
    weights = torch.randn_like(case.defined())
    expected = results(case, lambda c: c.defined(), weights)
    for a, b in zip(results(case, lambda c: c.computed(kernel), weights), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_kind
def test_gradients_are_the_limits_of_difference_quotients(kernel, kind, options):
    case = kind.random(2, 4, 3, 2, 2, **options)
    inputs = [t.requires_grad_() for t in tensors(case)]

    def f(*values):
        values = iter(values)
        mask = getattr(case, 'mask', None)
        return mapped(case, lambda t: t if t is mask else next(values)).computed(kernel)

    assert gradcheck(f, inputs, fast_mode=True)
    # Twice: by torch's operators, whatever computed the first.
    assert gradgradcheck(f, inputs, fast_mode=True)


@every_kind
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2**-5)])
def test_lower_precision_is_the_same_within_its_rounding(kernel, kind, options, dtype, tolerance):
    case = kind.random(3, 24, 17, 12, 8, dtype=dtype, **options)
    weights = torch.randn(3, 24, 17, 12, dtype=torch.float64).to(dtype)
    got = results(case, lambda c: c.computed(kernel), weights)
    exact = mapped(case, lambda t: t.double())
    expected = results(exact, lambda c: c.defined(), weights)
    assert got[0].dtype == dtype
    for a, b in zip(got, expected, strict=True):
        # Values near a kink may land on either side of it; few do, so the norm is compared.
        error = (a.double() - b).norm() / b.norm()
        assert error < tolerance * (1 if a is got[0] else 3)


@pytest.mark.parametrize('n, c, groups', [(2, 8, 4), (0, 8, 4)])
@every_kind
def test_one_pixel_and_no_image(kernel, kind, options, n, c, groups):
    case = kind.random(n, c, 1, 1, groups, **options)
    weights = torch.randn_like(case.defined())
    expected = results(case, lambda c: c.defined(), weights)
    got = results(case, lambda c: c.computed(kernel), weights)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


LAYOUTS = dict(
    channels_first=lambda x: x.contiguous(),
    part_of_a_batch=lambda x: torch.stack([x, x], 1)[:, 1],
    part_of_the_channels=lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    part_of_a_row=lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    turned=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', [NormRelu, NormReluConv, Residual, Sum])
def test_any_layout_in_memory(kernel, kind, layout):
    case = kind.random(2, 6, 4, 5, 3)
    other = mapped(case, lambda t: LAYOUTS[layout](t) if t.dim() == 4 else t)
    weights = torch.randn(2, 6, 5, 4, dtype=torch.float64).transpose(2, 3)
    expected = results(case, lambda c: c.computed(kernel), weights)
    got = [other.computed(kernel), *results(other, lambda c: c.computed(kernel), weights)[1:]]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nearest_pixels_are_those_of_torch(kernel):
    """Of every size that a scale can have beside another one, and of some that it cannot."""
    for height in (1, 2, 3, 4, 5, 7, 11, 23):
        own = torch.zeros(1, 1, height, 9, dtype=torch.float64)
        for small in range(1, height + 3):
            term = torch.rand(1, 1, small, 3, dtype=torch.float64, requires_grad=True)
            y = sum_rectify(own, [Term(term, upsample=True)], kernel=kernel)
            expected = F.interpolate(term, size=(height, 9), mode='nearest')
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
            weights = torch.rand_like(y)
            grads = [torch.autograd.grad(out, term, weights)[0] for out in (y, expected)]
            torch.testing.assert_close(*grads)


def test_a_sum_without_terms_is_its_rectifier(kernel):
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = sum_rectify(x, [], kernel=kernel)
    torch.testing.assert_close(y, F.relu(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], (x > 0).float())


@pytest.mark.parametrize('mean', [0.0, 1e3, 3e4])
def test_no_digits_are_lost_to_a_large_mean(kernel, mean):
    """E[x^2] - E[x]^2 in float32 would have no correct digit left at 3e4."""
    x = torch.randn(2, 8, 30, 30) + mean
    got = norm_relu(x, Norm(4), relu=False, kernel=kernel)
    expected = norm_relu(x.double(), Norm(4), relu=False, kernel='native')
    # That of the mean itself in float32, as of x.
    tolerance = 1e-5 + 2**-23 * mean
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('rows', [1, 2, 9, 40])
def test_no_digits_are_lost_where_an_image_begins_otherwise_than_it_goes_on(kernel, rows):
    """The first pixels, about which sums may be taken, far from the mean of all."""
    x = torch.randn(1, 4, 60, 60)
    x[:, :, :rows] += 1e4
    x[:, :, -1, -1] -= 1e4
    got = norm_relu(x, Norm(2), relu=False, kernel=kernel)
    expected = norm_relu(x.double(), Norm(2), relu=False, kernel='native')
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_pass_to_their_image_alone(kernel, value, dtype):
    """A solver looks for them. A rectifier that took NaN for 0 would hide them."""
    x, z, other = (maps(3, 4, 5, 5, dtype) for _ in range(3))
    clean = [
        norm_relu(x, Norm(2), kernel=kernel),
        residual_norms(x, z, Norm(2), Norm(1), kernel=kernel),
        sum_rectify(x, [Term(other, Norm(2))], kernel=kernel),
        sum_rectify(x, [Term(other, Norm(2))], smooth=True, kernel=kernel),
    ]
    x[1, 2, 3, 3] = value
    hurt = [
        norm_relu(x, Norm(2), kernel=kernel),
        residual_norms(x, z, Norm(2), Norm(1), kernel=kernel),
        sum_rectify(x, [Term(other, Norm(2))], kernel=kernel),
        sum_rectify(x, [Term(other, Norm(2))], smooth=True, kernel=kernel),
    ]
    # Of the group of channels 2 and 3; of all, since norm3 has one group; of the pixel.
    assert hurt[0][1, 2:].isnan().all() and not hurt[0][1, :2].isnan().any()
    assert hurt[1][1].isnan().all()
    for y in hurt[2:]:
        got = y[1, 2, 3, 3].item()
        assert math.isnan(got) if math.isnan(value) else got == pytest.approx(max(value, 0))
    for a, b in zip(hurt, clean):
        assert_same(a[::2], b[::2])


def test_softplus_is_exact_over_its_whole_range(kernel):
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e4, 1e4])]).double()
    x = x.view(1, 1, -1, 1).requires_grad_()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        y = sum_rectify(x.to(dtype), [], smooth=True, kernel=kernel)
        torch.testing.assert_close(y.double(), F.softplus(x), rtol=tolerance, atol=tolerance)
        slope = torch.autograd.grad(y.sum(), x)[0]
        expected = torch.autograd.grad(F.softplus(x).sum(), x)[0]
        torch.testing.assert_close(slope, expected, rtol=0, atol=tolerance)


def test_the_dtype_of_the_first_map_is_that_of_the_result(kernel):
    """A float32 state beside maps in bfloat16, as under autocast."""
    x, z = maps(2, 4, 3, 3, torch.bfloat16), maps(2, 4, 3, 3, torch.float32)
    norms = Norm(2, torch.rand(4), torch.rand(4)), Norm(1, torch.rand(4), torch.rand(4))
    with torch.autocast('cpu', torch.bfloat16):
        for y in (
            norm_relu(x, norms[0], kernel=kernel),
            residual_norms(x, z.requires_grad_(), *norms, injection=z, kernel=kernel),
            sum_rectify(x, [Term(z, norms[0]), Term(z)], kernel=kernel),
        ):
            assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.float().sum(), z)
    assert grad.dtype == torch.float32 and grad.norm() > 0


def test_autocast_does_not_choose_the_dtype_of_a_norm(monkeypatch):
    """Its list says float32 for group norm on a GPU, which would double the map."""
    cast = []

    def group_norm(x, *_):
        cast.append(torch.is_autocast_enabled('cpu'))
        return x

    monkeypatch.setattr(torch, 'group_norm', group_norm)
    for enabled in (True, False):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            native_norm(torch.zeros(1, 4, 2, 2), Norm(2))
            assert torch.is_autocast_enabled('cpu') == enabled
    assert cast == [False, False]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_of_the_whole_network(kernel, dtype):
    """Scales and shifts in bfloat16, too; float16 is computed by torch."""
    case = mapped(Residual.random(2, 4, 6, 5, 2), lambda t: t.to(dtype))
    exact = mapped(case, lambda t: t.double())
    weights = torch.randn(2, 4, 6, 5, dtype=torch.float64).to(dtype)
    got = results(case, lambda c: c.computed(kernel), weights)
    expected = results(exact, lambda c: c.defined(), weights)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 0.05 * b.norm()
