"""The flat state and the layer."""

import pytest
import torch

from mdeq_mm.deq import ImplicitLayer, JacobianFreeGradient, JacobianRegularizer
from mdeq_mm.deq.problem import pack, unpack
from mdeq_mm.deq.solvers import Anderson, Status
from mdeq_mm.registry import build_implicit

from ..checks import assert_same

SHAPES = [(4, 5, 7), (6, 3, 4), (2, 1, 1)]


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('n', [1, 3])
def test_unpack_inverts_pack(n, channels_last):
    features = [torch.randn(n, *shape) for shape in SHAPES]
    z = pack(features, channels_last)
    assert z.shape == (n, sum(c * h * w for c, h, w in SHAPES))
    for got, feature in zip(unpack(z, SHAPES, channels_last), features):
        assert_same(got, feature)
        assert got._base is not None


def test_norm_of_the_state_does_not_depend_on_the_layout():
    features = [torch.randn(2, *shape) for shape in SHAPES]
    torch.testing.assert_close(pack(features).norm(dim=1), pack(features, True).norm(dim=1))


def test_state_that_does_not_fit_the_shapes_is_refused():
    with pytest.raises(ValueError, match='do not fill'):
        unpack(torch.zeros(2, 500), SHAPES)


def test_unrolled_layer_is_plain_backpropagation():
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, dtype=torch.float64)
    solver = dict(type='FixedPointIteration', max_iter=3)
    layer = build_implicit(solver, dict(type='ImplicitGradient', solver=solver), unrolled_layers=3)

    def f(z):
        return torch.tanh(z @ w + x)

    out = layer(f, torch.zeros_like(x))
    expected = f(f(f(torch.zeros_like(x))))
    torch.testing.assert_close(out, expected)
    got, wanted = (torch.autograd.grad(o.sum(), w)[0] for o in (out, expected))
    torch.testing.assert_close(got, wanted)
    assert layer.forward_stats is None


def test_stats_tell_what_both_solves_did():
    x = torch.full((3, 2), 0.3, requires_grad=True)
    layer = build_implicit(
        dict(type='FixedPointIteration', max_iter=40, tol=1e-4),
        dict(type='ImplicitGradient', solver=dict(type='Anderson', max_iter=1, tol=1e-4)),
    )
    out = layer(lambda z: 0.5 * z + x, torch.zeros(3, 2))
    assert layer.backward_stats is None
    out.sum().backward()
    forward, backward = layer.forward_stats, layer.backward_stats
    assert set(forward.status.tolist()) == {Status.CONVERGED}
    assert forward.residual.max() <= 1e-4
    assert forward.summary()['nfe'] == forward.num_iter[0].item()
    assert backward.summary() == pytest.approx(dict(nfe=1, residual=1 / 3, converged=0, failed=0))


def test_evaluation_may_spend_other_calls():
    solver = dict(type='FixedPointIteration', max_iter=9, tol=0)
    gradient = dict(type='JacobianFreeGradient')
    layer = build_implicit(solver, gradient, eval_solver=dict(max_iter=4))
    anderson = dict(type='Anderson', max_iter=3, tol=0)
    other = build_implicit(solver, gradient, eval_solver=anderson)
    same = build_implicit(solver, gradient)

    def calls(module):
        module(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
        return module.forward_stats.num_iter.tolist()

    assert [calls(m.train()) for m in (layer, other, same)] == [[9, 9]] * 3
    assert [calls(m.eval()) for m in (layer, other, same)] == [[4, 4], [3, 3], [9, 9]]
    assert isinstance(other.current_solver, Anderson)


def test_wrong_solver_is_refused():
    gradient = dict(type='JacobianFreeGradient')
    with pytest.raises(ValueError, match='7 is not a solver. Valid: Anderson'):
        build_implicit(dict(type=7), gradient)
    with pytest.raises(TypeError, match='max_itr.*max_iter'):
        build_implicit(dict(type='Anderson'), gradient, eval_solver=dict(max_itr=4))
    with pytest.raises(TypeError, match='got 4'):
        build_implicit(dict(type='Anderson'), gradient, eval_solver=4)


def test_its_text_names_its_parts():
    solver, few = Anderson(max_iter=4), Anderson(max_iter=2)
    gradient, penalty = JacobianFreeGradient(), JacobianRegularizer(weight=0.5)
    assert repr(ImplicitLayer(solver, gradient)) == (
        f'ImplicitLayer(solver={solver}, gradient={gradient})'
    )
    layer = ImplicitLayer(solver, gradient, eval_solver=few, regularizer=penalty)
    assert repr(layer) == (
        f'ImplicitLayer(solver={solver}, gradient={gradient}, eval_solver={few}, '
        f'regularizer={penalty})'
    )
