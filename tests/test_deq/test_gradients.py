"""Gradients through an equilibrium against unrolled autograd and closed forms, in float64."""

import copy
import gc
import weakref

import pytest
import torch

from mdeq_mm.deq import FixedPointIteration, ImplicitLayer, SolverStats
from mdeq_mm.deq.gradients import (
    Gradient,
    ImplicitGradient,
    JacobianFreeGradient,
    PhantomGradient,
    SharedInverseGradient,
    TruncatedGradient,
)
from mdeq_mm.deq.solvers import Solution, Solver, Status, solve
from mdeq_mm.registry import build_implicit, build_part

from ..checks import assert_finite, assert_says

TIGHT = dict(type='LimitedMemoryBroyden', max_iter=200, tol=1e-13, memory=20)
EXACT = dict(type='ImplicitGradient', solver=TIGHT)


@pytest.fixture
def parts():
    """Weight, bias and input of tanh(z W' + x) with |W| = 0.7."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    w = (0.7 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_()
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    v = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return w, x, v


def run(layer, w, x):
    return layer(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x))


def unrolled(w, x, steps=300):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = torch.tanh(z @ w.T + x)
    return z


def neumann(w, x, v, terms):
    """sum_i (J')^i v for i < terms, with J taken at the equilibrium, then through one f."""
    z = unrolled(w, x).detach().requires_grad_()
    out = torch.tanh(z @ w.T + x)
    total, power = v, v
    for _ in range(terms - 1):
        (power,) = torch.autograd.grad(out, z, power, retain_graph=True)
        total = total + power
    return torch.autograd.grad(out, (w, x), total)


@pytest.mark.parametrize(
    'solver',
    [
        TIGHT,
        dict(type='Anderson', max_iter=200, tol=1e-13),
        dict(type='FixedPointIteration', max_iter=400, tol=1e-13),
    ],
    ids=lambda s: s['type'],
)
def test_implicit_gradient_is_that_of_the_unrolled_net(parts, solver):
    w, x, v = parts
    layer = build_implicit(solver, dict(type='ImplicitGradient', solver=solver))
    got = torch.autograd.grad(run(layer, w, x), (w, x), v)
    expected = torch.autograd.grad(unrolled(w, x), (w, x), v)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-6)


def test_gradcheck_through_the_layer(parts):
    w, x, _ = parts
    layer = build_implicit(TIGHT, EXACT)
    assert torch.autograd.gradcheck(lambda w, x: run(layer, w, x), (w, x), atol=1e-6)


def test_truncated_and_jacobian_free_are_the_first_terms_of_the_series(parts):
    w, x, v = parts
    for gradient, terms in (
        (JacobianFreeGradient(), 1),
        (TruncatedGradient(steps=1, damping=1), 2),
        (TruncatedGradient(steps=4, damping=1), 5),
    ):
        got = torch.autograd.grad(run(build_implicit(TIGHT, gradient), w, x), (w, x), v)
        torch.testing.assert_close(got, neumann(w, x, v, terms), atol=1e-9, rtol=1e-7)


def test_truncated_gradient_converges_to_the_exact_one(parts):
    w, x, v = parts
    expected = torch.autograd.grad(run(build_implicit(TIGHT, EXACT), w, x), (w, x), v)
    got = torch.autograd.grad(
        run(build_implicit(TIGHT, TruncatedGradient(steps=150)), w, x), (w, x), v
    )
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)


def test_damping_tames_a_series_whose_terms_grow():
    w = torch.tensor([[-1.5]], dtype=torch.float64)
    x = torch.tensor([[1.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[0.5], [3.0]], dtype=torch.float64)
    got = {}
    for damping in (1.0, 0.5):
        layer = build_implicit(TIGHT, TruncatedGradient(steps=30, damping=damping))
        out = layer(lambda z: z @ w.T + x, torch.zeros_like(x))
        (got[damping],) = torch.autograd.grad(out, x, v)
    # (1 - J')^-1 v
    torch.testing.assert_close(got[0.5], v / 2.5)
    assert (got[1.0].abs() > 1e4 * v.abs()).all()


def test_shared_inverse_is_exact_in_one_dimension():
    """One pair gives Broyden the whole Jacobian of a scalar affine f."""
    w = torch.tensor([[0.6]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[0.5], [3.0]], dtype=torch.float64)

    def grads(gradient):
        layer = build_implicit(TIGHT, gradient)
        return torch.autograd.grad(layer(lambda z: z @ w.T + x, torch.zeros_like(x)), (w, x), v)

    got = grads(SharedInverseGradient(max_growth=10.0))
    torch.testing.assert_close(got, grads(EXACT))
    # g = v / (1 - w) is 2.5 v: beyond a smaller limit it falls back.
    truncated = grads(TruncatedGradient(2, damping=1))
    torch.testing.assert_close(grads(SharedInverseGradient(2)), truncated)


def test_shared_inverse_refines_to_the_exact_gradient(parts):
    w, x, v = parts
    refined = run(build_implicit(TIGHT, SharedInverseGradient(steps=150)), w, x)
    exact = run(build_implicit(TIGHT, EXACT), w, x)
    got, expected = (torch.autograd.grad(out, (w, x), v) for out in (refined, exact))
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)


def test_shared_inverse_falls_back_sample_by_sample(parts):
    w, x, v = parts
    solution = solve(
        lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x), build_part(TIGHT, Solver), True
    )
    growth = solution.state.inverse_transpose(v).norm(dim=1) / v.norm(dim=1)
    limit = growth.sort().values[1:3].mean().item()
    outs = [
        run(build_implicit(TIGHT, gradient), w, x)
        for gradient in (
            SharedInverseGradient(max_growth=limit),
            SharedInverseGradient(max_growth=100.0),
            JacobianFreeGradient(),
        )
    ]
    mixed, kept, fallen = (torch.autograd.grad(out, x, v)[0] for out in outs)
    for i in range(len(x)):
        torch.testing.assert_close(mixed[i], kept[i] if growth[i] < limit else fallen[i])


def test_shared_inverse_needs_a_solver_that_learns():
    with pytest.raises(TypeError, match='LimitedMemoryBroyden or Anderson'):
        build_implicit(dict(type='FixedPointIteration'), SharedInverseGradient())


def test_phantom_gradient_is_backpropagation_through_damped_layers(parts):
    w, x, v = parts
    layer = build_implicit(TIGHT, PhantomGradient(steps=3, damping=0.6))
    got = torch.autograd.grad(run(layer, w, x), (w, x), v)
    z = unrolled(w, x).detach()
    for _ in range(3):
        z = 0.4 * z + 0.6 * torch.tanh(z @ w.T + x)
    torch.testing.assert_close(got, torch.autograd.grad(z, (w, x), v), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    'gradient',
    [
        build_part(EXACT, Gradient),
        TruncatedGradient(),
        JacobianFreeGradient(),
        SharedInverseGradient(),
        PhantomGradient(),
    ],
    ids=lambda g: type(g).__name__,
)
def test_every_gradient_returns_the_equilibrium(parts, gradient):
    w, x, _ = parts
    layer = build_implicit(TIGHT, gradient)
    torch.testing.assert_close(run(layer, w, x), unrolled(w, x))
    with torch.no_grad():
        out = run(layer, w, x)
    assert not out.requires_grad
    torch.testing.assert_close(out, unrolled(w, x))


def test_two_forwards_then_two_backwards(parts):
    """Each forward keeps its own hook and equilibrium, whichever backward comes first."""
    w, x, v = parts
    layer = build_implicit(TIGHT, EXACT)
    inputs = [x, 2 * x.detach() + 1]
    expected = [torch.autograd.grad(run(layer, w, i), w, v)[0] for i in inputs]
    outs = [run(layer, w, i) for i in inputs]
    got = [torch.autograd.grad(out, w, v)[0] for out in outs]
    torch.testing.assert_close(got, expected)
    outs = [run(layer, w, i) for i in inputs]
    got = [torch.autograd.grad(out, w, v)[0] for out in reversed(outs)][::-1]
    torch.testing.assert_close(got, expected)


def test_joint_backward_of_two_forwards_is_the_sum(parts):
    w, x, v = parts
    layer = build_implicit(TIGHT, EXACT)
    single = [torch.autograd.grad(run(layer, w, i), w, v)[0] for i in (x, 3 * x)]
    both = torch.autograd.grad((run(layer, w, x) + run(layer, w, 3 * x)), w, v)[0]
    torch.testing.assert_close(both, single[0] + single[1])


def test_gradient_of_a_sample_does_not_depend_on_its_batch(parts):
    w, x, v = parts
    layer = build_implicit(
        dict(type='LimitedMemoryBroyden', max_iter=30, tol=1e-6),
        dict(type='ImplicitGradient', solver=dict(type='Anderson', max_iter=30, tol=1e-6)),
    )
    (together,) = torch.autograd.grad(run(layer, w, x), x, v)
    for i in range(len(x)):
        alone = x[i : i + 1].detach().requires_grad_()
        (single,) = torch.autograd.grad(run(layer, w, alone), alone, v[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], single, atol=1e-12, rtol=1e-9)


def test_second_derivative_gives_one_clear_error(parts):
    w, x, v = parts
    out = run(build_implicit(TIGHT, EXACT), w, x)
    with pytest.raises(NotImplementedError, match='create_graph'):
        torch.autograd.grad(out, w, v, create_graph=True)


def test_failing_backward_solve_leaves_a_finite_gradient(parts):
    """An adjoint that diverges falls back to its best iterate, at worst the incoming gradient."""
    _, x, v = parts
    w = (3 * torch.eye(6, dtype=torch.float64)).requires_grad_()
    layer = build_implicit(
        dict(type='FixedPointIteration', max_iter=5),
        dict(type='ImplicitGradient', solver=dict(type='FixedPointIteration', max_iter=2000)),
    )
    out = layer(lambda z: z @ w.T + x, torch.zeros_like(x))
    grads = torch.autograd.grad(out, (w, x), v)
    assert_finite(grads)
    assert layer.backward_stats.summary()['converged'] == 0


def test_graph_is_freed_and_none_of_it_stays_on_the_layer(parts):
    w, x, v = parts
    layer = build_implicit(TIGHT, EXACT)

    class Witness:
        """Lives exactly as long as the function of one forward pass."""

    def forward():
        witness = Witness()

        def f(z, kept=witness):
            return torch.tanh(z @ w.T + x)

        return layer(f, torch.zeros_like(x)), weakref.ref(witness)

    out, witness = forward()
    out.backward(v)
    copy.deepcopy(layer)
    del out
    gc.collect()
    assert witness() is None


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: build_implicit(dict(type='Andersen'), EXACT), ["'Anderson'", 'FixedPoint']),
        (lambda: build_implicit(dict(max_iter=3), EXACT), ['type', 'max_iter']),
        (lambda: build_implicit(TIGHT, dict(type='PhantomGradent')), ['PhantomGradient']),
        (lambda: build_implicit(TIGHT, TIGHT), ['is not a gradient', 'ImplicitGradient']),
        (lambda: build_implicit(EXACT, EXACT), ['is not a solver', 'Anderson']),
        (lambda: build_implicit(TIGHT, dict(type='ImplicitGradient', slover=1)), ['solver']),
        (lambda: build_implicit(TIGHT, EXACT, unrolled_layers=-1), ['unrolled_layers', '-1']),
        (lambda: ImplicitGradient(solver='Broyden'), ['ImplicitGradient', 'solver', 'Broyden']),
        (lambda: TruncatedGradient(steps=0), ['steps', '0']),
        (lambda: TruncatedGradient(damping=0), ['damping', '0']),
        (lambda: PhantomGradient(damping=1.5), ['damping', '1.5']),
    ],
)
def test_wrong_part_is_named_with_the_valid_choices(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert_says(error, words)


def test_nan_in_the_learnt_inverse_falls_back_sample_by_sample(parts):
    w, x, v = parts
    z = unrolled(w, x).detach()

    class Estimate:
        def inverse_transpose(self, v):
            estimate = -1.1 * v
            estimate[1, 2] = float('nan')
            estimate[2] = float('inf')
            return estimate

    solution = Solution(z, *[torch.zeros(len(z))] * 4, state=Estimate())
    out = SharedInverseGradient()(lambda z: torch.tanh(z @ w.T + x), solution)
    (got,) = torch.autograd.grad(out, x, v)
    slope = 1 - z.square()
    factor = torch.tensor([1.1, 1, 1, 1.1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(got, factor * v * slope, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize('graph_before', [False, True])
def test_autocast_keeps_no_weight_of_a_solve_for_the_call_with_a_graph(graph_before):
    """A weight that was cast without grad would cut its parameter off from the gradient."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(6, 6), torch.randn(4, 6)
    layer = ImplicitLayer(FixedPointIteration(max_iter=20, tol=0), JacobianFreeGradient())

    def f(z):
        return torch.tanh(0.5 * linear(z).float() + x)

    (wanted,) = torch.autograd.grad(layer(f, torch.zeros_like(x)).sum(), linear.weight)
    with torch.autocast('cpu', torch.bfloat16):
        with torch.set_grad_enabled(graph_before):
            layer(f, torch.zeros_like(x))
        (got,) = torch.autograd.grad(
            layer(f, torch.zeros_like(x)).sum(), linear.weight, allow_unused=True
        )
    assert got is not None, 'the weight got no gradient'
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)


def test_statistics_are_those_of_the_last_pass_alone(parts):
    w, x, v = parts
    layer = build_implicit(TIGHT, EXACT)
    torch.autograd.grad(run(layer, w, x), w, v)
    assert layer.forward_stats is not None and layer.backward_stats is not None
    run(layer, w, x)
    assert layer.forward_stats is not None and layer.backward_stats is None
    layer.unrolled_layers = 2
    run(layer, w, x)
    assert layer.forward_stats is None and layer.backward_stats is None


def test_diverged_and_non_finite_samples_count_as_failed():
    status = torch.tensor([Status.CONVERGED, Status.EXHAUSTED, Status.DIVERGED, Status.NON_FINITE])
    stats = SolverStats(torch.tensor([0.0, 1, 2, 5]), torch.tensor([1, 2, 3, 6]), status)
    assert stats.summary() == dict(nfe=3.0, residual=2.0, converged=0.25, failed=2.0)


def test_the_solver_of_a_gradient_has_no_jitter():
    with pytest.raises(ValueError, match='jitter'):
        build_part(dict(EXACT, solver=dict(TIGHT, jitter=(100, 300))), Gradient)
