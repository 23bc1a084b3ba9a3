"""Jacobian penalty and spectral radius against dense Jacobians, in float64."""

import pytest
import torch

from mdeq_mm.deq import (
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    ImplicitLayer,
    JacobianFreeGradient,
    JacobianRegularizer,
    PhantomGradient,
    SharedInverseGradient,
    TruncatedGradient,
    spectral_radius,
)

from ..checks import assert_same, assert_says

SOLVER = Anderson(max_iter=200, tol=1e-12)
GRADIENTS = [
    ImplicitGradient(SOLVER),
    TruncatedGradient(),
    JacobianFreeGradient(),
    SharedInverseGradient(),
    PhantomGradient(),
]
every_gradient = pytest.mark.parametrize('gradient', GRADIENTS, ids=lambda g: type(g).__name__)


@pytest.fixture
def parts():
    """Weight and input of tanh(z W' + x) with |W| = 0.7."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    w = (0.7 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_()
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    return w, x


def layer_of(gradient=GRADIENTS[0], **options):
    return ImplicitLayer(SOLVER, gradient, regularizer=JacobianRegularizer(**options))


def f_of(w, x):
    return lambda z: torch.tanh(z @ w.T + x)


def jacobians(w, x, z):
    """(N, D, D), differentiable in w."""
    slope = 1 - torch.tanh(z @ w.T + x).square()
    return slope[:, :, None] * w


@every_gradient
def test_penalty_and_its_gradient_are_those_of_the_dense_jacobian(parts, gradient):
    """At fixed z*, like the penalty; v is the layer's draw."""
    w, x = parts
    layer = layer_of(gradient, weight=0.7, samples=2)
    torch.manual_seed(3)
    z = layer(f_of(w, x), torch.zeros_like(x))
    penalty = layer.pop_penalty()
    got = torch.autograd.grad(penalty, (w, x), retain_graph=True)
    torch.manual_seed(3)
    # The draw that decides whether there is a penalty comes first.
    torch.rand(())
    expected = 0
    for _ in range(2):
        v = torch.randn_like(x)
        vjp = torch.einsum('ni,nij->nj', v, jacobians(w, x, z.detach()))
        expected = expected + 0.7 * vjp.square().sum() / x.numel() / 2
    torch.testing.assert_close(penalty, expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(got, torch.autograd.grad(expected, (w, x)), rtol=1e-6, atol=1e-9)


def test_expected_penalty_is_the_mean_square_of_the_jacobian(parts):
    w, x = parts
    layer = layer_of(weight=1.0, samples=4000)
    torch.manual_seed(0)
    z = layer(f_of(w, x), torch.zeros_like(x)).detach()
    expected = jacobians(w, x, z).square().sum() / x.numel()
    torch.testing.assert_close(layer.pop_penalty(), expected, rtol=0.05, atol=0)


@every_gradient
def test_the_penalty_leaves_the_gradient_of_the_loss_alone(parts, gradient):
    w, x = parts
    v = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    plain = ImplicitLayer(SOLVER, gradient)(f_of(w, x), torch.zeros_like(x))
    layer = layer_of(gradient, weight=0.7)
    penalized = layer(f_of(w, x), torch.zeros_like(x))
    torch.testing.assert_close(penalized, plain)
    expected = torch.autograd.grad(plain, (w, x), v)
    got = torch.autograd.grad(penalized, (w, x), v, retain_graph=True)
    torch.testing.assert_close(got, expected)
    # One backward pass of both is the sum.
    penalty = layer.pop_penalty()
    own = torch.autograd.grad(penalty, (w, x), retain_graph=True)
    both = torch.autograd.grad((penalized * v).sum() + penalty, (w, x))
    torch.testing.assert_close(both, tuple(a + b for a, b in zip(own, expected)))


def test_no_penalty_in_evaluation_without_grad_or_at_probability_zero(parts):
    w, x = parts
    layer = layer_of(weight=1.0)
    layer.eval()(f_of(w, x), torch.zeros_like(x))
    assert layer.pop_penalty() is None
    with torch.no_grad():
        layer.train()(f_of(w, x), torch.zeros_like(x))
    assert layer.pop_penalty() is None
    never = layer_of(weight=1.0, probability=0.0)
    never(f_of(w, x), torch.zeros_like(x))
    assert never.pop_penalty() is None
    layer(f_of(w, x), torch.zeros_like(x))
    assert layer.pop_penalty() > 0 and layer.pop_penalty() is None


@pytest.mark.parametrize('f', [lambda x: lambda z: torch.tanh(x), lambda x: lambda z: x.detach()])
@every_gradient
def test_no_penalty_where_f_does_not_depend_on_the_state(parts, f, gradient):
    x = parts[1]
    layer = layer_of(gradient, weight=1.0)
    layer(f(x), torch.zeros_like(x))
    assert layer.pop_penalty() == 0


def test_penalties_of_two_passes_add_up(parts):
    w, x = parts
    layer = layer_of(weight=1.0)
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer(f_of(w, x), torch.zeros_like(x))
    both = layer.pop_penalty()
    single = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer(f_of(w, x), torch.zeros_like(x))
        single.append(layer.pop_penalty())
    torch.testing.assert_close(both, single[0] + single[1])


def test_the_iteration_decides_whether_there_is_a_penalty(parts):
    """With an iteration's seed, independent of earlier draws, and with the given probability."""
    w, x = parts
    layer = layer_of(weight=1.0, probability=0.3)

    def has_penalty(seed):
        layer.iteration_seed = seed
        layer(f_of(w, x), torch.zeros_like(x))
        return layer.pop_penalty() is not None

    torch.manual_seed(0)
    first = [has_penalty(seed) for seed in range(100)]
    torch.manual_seed(1)
    assert first == [has_penalty(seed) for seed in range(100)]
    assert 15 <= sum(first) <= 45


def test_penalties_nobody_takes_are_named_and_dropped(parts):
    w, x = parts
    layer = layer_of(weight=1.0)
    with pytest.warns(UserWarning, match='pop_penalty.*MDEQRegularizerHook'):
        for _ in range(40):
            layer(f_of(w, x), torch.zeros_like(x))
    assert len(layer._reports.penalties) <= 16


@pytest.mark.parametrize('complex_pair', [False, True])
def test_spectral_radius_is_that_of_the_matrix(complex_pair):
    """Per sample; also where the largest eigenvalues are a complex pair."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    values = torch.diag_embed(torch.tensor([[0.9, 0.5, 0.3, 0.2, 0.1]] * 2).double())
    if complex_pair:
        values[:, :2, :2] = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    scale = torch.tensor([1.0, 1.7], dtype=torch.float64)[:, None, None]
    a = scale * basis @ values @ torch.linalg.inv(basis)
    z = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    found = spectral_radius(lambda z: torch.einsum('nij,nj->ni', a, z), z, iterations=400)
    torch.testing.assert_close(found, 0.9 * scale.flatten(), rtol=0.02, atol=0)


def test_spectral_radius_of_maps_and_of_a_constant():
    z = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        spectral_radius(lambda z: -0.6 * z, z, 5), torch.full((3,), 0.6, dtype=torch.float64)
    )
    assert_same(spectral_radius(lambda z: torch.ones_like(z), z), torch.zeros(3).double())
    assert_same(spectral_radius(lambda z: 0 * z, z), torch.zeros(3).double())


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(weight=-1), ['weight', '-1']),
        (dict(weight=True), ['weight', 'True']),
        (dict(weight=1, probability=1.5), ['probability', '1.5']),
        (dict(weight=1, samples=0), ['samples', '0']),
    ],
)
def test_wrong_options_of_the_regularizer_are_named(options, words):
    with pytest.raises(ValueError) as error:
        JacobianRegularizer(**options)
    assert_says(error, words)


def test_jitter_draws_around_the_budget():
    solver = Anderson(max_iter=8, jitter=(5, 20))
    torch.manual_seed(0)
    drawn = [solver.drawn().max_iter for _ in range(2000)]
    assert set(drawn) == set(range(5, 21))
    below = sum(n <= 8 for n in drawn) / len(drawn)
    assert 0.45 < below < 0.55
    # Uniform on either side.
    for n, share in ((5, 1 / 8), (8, 1 / 8), (9, 1 / 24), (20, 1 / 24)):
        assert abs(drawn.count(n) / len(drawn) - share) < 0.03
    assert Anderson(max_iter=8, jitter=(8, 8)).drawn().max_iter == 8
    assert solver.drawn(torch.Generator().manual_seed(4)) == solver.drawn(
        torch.Generator().manual_seed(4)
    )


def test_jitter_is_for_training_passes(parts):
    w, x = parts
    solver = FixedPointIteration(max_iter=8, tol=0, jitter=(5, 20))
    layer = ImplicitLayer(solver, JacobianFreeGradient())

    def calls(seed):
        layer.iteration_seed = seed
        layer(f_of(w, x), torch.zeros_like(x))
        (number,) = set(layer.forward_stats.num_iter.tolist())
        return number

    assert len({calls(seed) for seed in range(30)}) > 5
    assert [calls(seed) for seed in range(30)] == [calls(seed) for seed in range(30)]
    layer.eval()
    assert {calls(seed) for seed in range(5)} == {8}


@pytest.mark.parametrize('jitter', [(5,), 5, (9, 20), (2, 7), (0, 9), (5, 20.0)])
def test_wrong_jitter_is_named(jitter):
    with pytest.raises(ValueError, match='jitter'):
        Anderson(max_iter=8, jitter=jitter)
    with pytest.raises(ValueError, match='jitter.*forward solver'):
        ImplicitGradient(Anderson(max_iter=8, jitter=(5, 20)))
