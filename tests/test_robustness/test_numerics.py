"""Bad numbers: finite stays finite, non-finite is reported, other images are unaffected."""

import pytest
import torch

from mdeq_mm.deq.solvers import Anderson, FixedPointIteration, LimitedMemoryBroyden, Status, solve
from mdeq_mm.registry import build_implicit

from ..checks import assert_finite, assert_nonzero, grads
from . import SOLVERS, contracting, tiny_backbone

INF, NAN = float('inf'), float('nan')
GRADIENTS = (
    dict(type='ImplicitGradient', solver=dict(type='LimitedMemoryBroyden', max_iter=6)),
    dict(type='TruncatedGradient', steps=3),
    dict(type='JacobianFreeGradient'),
    dict(type='SharedInverseGradient', steps=1),
    dict(type='PhantomGradient', steps=2),
)
every_solver = pytest.mark.parametrize('kind', SOLVERS)


def make(kind, **options):
    return dict(zip(SOLVERS, (FixedPointIteration, Anderson, LimitedMemoryBroyden)))[kind](
        **options
    )


def image(n=3, size=12):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@every_solver
@pytest.mark.parametrize('bad', [NAN, INF, -INF])
@pytest.mark.parametrize('where', ['pixel', 'image'])
def test_a_bad_image_is_reported_and_leaves_its_batch_mates_alone(kind, bad, where):
    net = tiny_backbone(kind, norm_eval=True)
    clean = image().requires_grad_()
    expected = net(clean)
    # A random direction: norms make the plain sum of a map nearly constant.
    weight = torch.randn_like(expected[0])
    (wanted,) = torch.autograd.grad((expected[0] * weight).sum(), clean)

    dirty = image()
    if where == 'pixel':
        dirty[1, 0, 3, 3] = bad
    else:
        dirty[1] = bad
    dirty.requires_grad_()
    outs = net(dirty)
    mates = [0, 2]
    status = net.implicit.forward_stats.status
    assert status[1] == Status.NON_FINITE
    assert Status.NON_FINITE not in status[mates].tolist()
    for out, clean_out in zip(outs, expected):
        torch.testing.assert_close(out[mates], clean_out[mates])
        # The loss on the bad image is not finite: it is not hidden behind zeros.
        assert not torch.isfinite(out[1]).all()

    (got,) = torch.autograd.grad((outs[0] * weight).sum(), dirty)
    torch.testing.assert_close(got[mates], wanted[mates], rtol=1e-3, atol=1e-5)
    assert Status.NON_FINITE not in net.implicit.backward_stats.status[mates].tolist()


@pytest.mark.parametrize('gradient', GRADIENTS, ids=[g['type'] for g in GRADIENTS])
def test_no_gradient_carries_a_bad_image_to_its_batch_mates(gradient):
    net = contracting(tiny_backbone('LimitedMemoryBroyden', norm_eval=True, gradient=gradient))

    def grads(x):
        x.requires_grad_()
        out = net(x)[1]
        return torch.autograd.grad((out * torch.linspace(-1, 1, 9).view(3, 3)).sum(), x)[0]

    clean, dirty = image(), image()
    dirty[0] = NAN
    torch.testing.assert_close(grads(dirty)[1:], grads(clean)[1:], rtol=1e-4, atol=1e-7)


def test_a_bad_image_shows_in_the_gradient_of_the_weights():
    """It must not pass as a step: AMP's scaler and gradient clipping check for this."""
    net = tiny_backbone(norm_eval=True)
    x = image()
    x[1] = NAN
    net(x)[0].square().mean().backward()
    assert net.implicit.backward_stats.summary()['failed'] == 1
    assert not torch.isfinite(net.stem[0].conv.weight.grad).all()


@every_solver
@pytest.mark.parametrize('value', [0.0, 1.0, -255.0, 1e6, 1e15])
def test_constant_images_have_finite_equilibria_and_gradients(kind, value):
    net = tiny_backbone(kind, norm_eval=True)
    x = torch.full((2, 3, 10, 14), value, requires_grad=True)
    outs = net(x)
    assert_finite(outs)
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    assert_finite(x.grad)
    assert_finite(grads(net))


@every_solver
def test_batch_statistics_of_a_constant_batch_stay_finite(kind):
    net = tiny_backbone(kind)
    net(torch.zeros(2, 3, 8, 8))[0].square().sum().backward()
    assert_finite(grads(net))
    assert_finite(dict(net.named_buffers()))


@every_solver
@pytest.mark.parametrize('value', [1e20, 3e38])
def test_images_near_overflow_are_finite_or_reported(kind, value):
    net = tiny_backbone(kind, norm_eval=True)
    x = image()
    x[1] *= value
    outs, expected = net(x), net(image())
    net(x)
    status = net.implicit.forward_stats.status
    finite = all(torch.isfinite(out[1]).all() for out in outs)
    assert finite or status[1] == Status.NON_FINITE
    torch.testing.assert_close(outs[0][[0, 2]], expected[0][[0, 2]])


@every_solver
@pytest.mark.parametrize('weight_norm', [True, False])
def test_weights_a_hundred_times_too_large(kind, weight_norm):
    net = tiny_backbone(kind, max_iter=12, weight_norm=weight_norm, norm_eval=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(100)
    outs = net(image())
    stats = net.implicit.forward_stats
    assert_finite(outs)
    assert_finite(stats.residual)
    assert Status.NON_FINITE not in stats.status.tolist()
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    assert_finite(grads(net))


@every_solver
@pytest.mark.parametrize('spoilt', [NAN, INF])
def test_a_spoilt_weight_is_reported_for_all(kind, spoilt):
    net = tiny_backbone(kind).eval()
    with torch.no_grad():
        net.cell.blocks[0].norm1.weight[0] = spoilt
    net(image())
    assert set(net.implicit.forward_stats.status.tolist()) == {Status.NON_FINITE}


def shift(z):
    return z + 1


def square_plus_one(z):
    return z * z + 1


def jump(z):
    """Away from zero on either side: no continuous path crosses f(z) = z."""
    return torch.where(z > 0, -torch.ones_like(z), torch.ones_like(z))


@every_solver
@pytest.mark.parametrize('f', [shift, square_plus_one, jump])
def test_without_a_fixed_point_nothing_converges_and_all_is_finite(kind, f):
    found = solve(f, torch.zeros(3, 2), make(kind, max_iter=50, tol=1e-9))
    assert_finite(dict(z=found.z, residual=found.residual))
    assert Status.CONVERGED not in found.status.tolist()
    residual = (f(found.z) - found.z).norm(dim=1) / f(found.z).norm(dim=1)
    torch.testing.assert_close(residual, found.residual)


@every_solver
def test_an_adjoint_without_a_solution_gives_a_finite_gradient(kind):
    """f = z + x has J = I, so that g = J'g + v has no solution for any v but zero."""
    solver = dict(type=kind, max_iter=20, tol=1e-6)
    layer = build_implicit(solver, dict(type='ImplicitGradient', solver=solver))
    x = torch.ones(2, 3, requires_grad=True)
    layer(lambda z: z + x, torch.zeros(2, 3)).sum().backward()
    assert_finite(x.grad)
    assert Status.CONVERGED not in layer.backward_stats.status.tolist()


@pytest.mark.parametrize('ridge', [0.0, 1e-6])
def test_andersons_singular_system_stays_with_its_sample(ridge):
    """All changes of the first sample's f are parallel: with two of them Y'Y is singular."""
    torch.manual_seed(0)
    regular = torch.randn(6, 6, dtype=torch.float64)
    regular *= 0.8 / torch.linalg.matrix_norm(regular, 2)
    direction = torch.ones(6, 6, dtype=torch.float64) / 12
    matrices, shift = torch.stack([direction, regular]), torch.randn(2, 6, dtype=torch.float64)

    def f(z, rows=slice(None)):
        return torch.einsum('nij,nj->ni', matrices[rows], z) + shift[rows]

    start, solver = torch.zeros(2, 6, dtype=torch.float64), Anderson(30, 1e-10, 5, ridge=ridge)
    both = solve(f, start, solver)
    assert set(both.status.tolist()) == {Status.CONVERGED}
    torch.testing.assert_close(f(both.z), both.z)
    alone = solve(lambda z: f(z, slice(1, 2)), start[1:], solver)
    torch.testing.assert_close(both.z[1:], alone.z, atol=1e-13, rtol=1e-11)
    assert both.num_iter[1] == alone.num_iter[0]


@every_solver
def test_zero_denominators_of_one_sample_stay_with_it(kind):
    """Solved at the start, f = 0 everywhere, f(z) = z, and a proper problem in one batch."""
    target = torch.tensor([[0.0], [0.0], [0.0], [2.0]])
    slope = torch.tensor([[0.5], [0.0], [1.0], [-0.5]])

    def f(z):
        return slope * (z - target) + target

    found = solve(f, torch.zeros(4, 5), make(kind, max_iter=60, tol=0))
    assert_finite(dict(z=found.z, residual=found.residual))
    assert not (found.z[:3] != 0).any()
    torch.testing.assert_close(found.z[3], torch.full((5,), 2.0))


@every_solver
@pytest.mark.parametrize('scale', [1e-19, 1e18, 1e30])
def test_states_at_the_ends_of_the_range(kind, scale):
    """Squares of such numbers under- or overflow; the answer may be poor but is finite."""
    target = scale * torch.tensor([[1.0, -2.0, 3.0]])
    found = solve(
        lambda z: 0.5 * (z - target) + target, torch.zeros(1, 3), make(kind, max_iter=60, tol=1e-3)
    )
    assert_finite(found.z)
    assert not torch.isnan(found.residual).any(), found.residual
    if found.status[0] == Status.CONVERGED:
        torch.testing.assert_close(found.z / scale, target / scale, rtol=1e-2, atol=1e-2)


@every_solver
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_autocast_gives_the_equilibrium_to_its_precision(kind, dtype):
    net = contracting(tiny_backbone(kind, max_iter=15, tol=1e-3, norm_eval=True))
    x = image()
    exact = net(x)
    assert set(net.implicit.forward_stats.status.tolist()) == {Status.CONVERGED}
    with torch.autocast('cpu', dtype=dtype):
        outs = net(x)
    for out, wanted in zip(outs, exact):
        assert out.dtype == torch.float32
        error = torch.linalg.vector_norm(out - wanted) / torch.linalg.vector_norm(wanted)
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    assert_finite(grads(net))
    assert_nonzero(grads(net))


@every_solver
def test_overflow_of_half_precision_is_reported(kind):
    """Inner maps above 65504 are inf in float16 and harmless in bfloat16.

    At the start, z = 0, they are zero: that is the only finite iterate, and it is returned.
    """
    net = tiny_backbone(kind, norm_eval=True)
    with torch.no_grad():
        net.cell.blocks[0].norm1.weight.fill_(1e6)
    for dtype, failed in ((torch.float16, True), (torch.bfloat16, False)):
        with torch.autocast('cpu', dtype=dtype):
            outs = net(image())
        reported = (net.implicit.forward_stats.status == Status.NON_FINITE).all()
        assert bool(reported) == failed
        assert_finite(outs)
