"""Finding the MDEQ of a model, and solving it with other budgets temporarily."""

import pytest
import torch
from torch import nn

from mdeq_mm.apis import evaluations_allowed, find_backbone
from mdeq_mm.deq import (
    Anderson,
    FixedPointIteration,
    FunctionProblem,
    ImplicitGradient,
    ImplicitLayer,
)


class Contraction(nn.Module):
    """z = z / 2 + x, whose equilibrium is 2 x, in a net of one's own."""

    def __init__(self, **options):
        super().__init__()
        solver = FixedPointIteration(max_iter=7, tol=0, jitter=(4, 9))
        self.implicit = ImplicitLayer(solver, ImplicitGradient(Anderson()), **options)

    def problem(self, x):
        return FunctionProblem(lambda z: z / 2 + x, torch.zeros_like(x))

    def forward(self, x):
        return self.implicit(self.problem(x))


X = torch.ones(2, 3, dtype=torch.float64)


def after(evaluations):
    """f applied so many times to 0, once more after the solve included."""
    return 2 * X * (1 - 0.5**evaluations)


@pytest.mark.parametrize('solver', [None, FixedPointIteration(max_iter=3, tol=0)])
def test_a_budget_holds_in_the_block_and_the_model_is_as_before(solver):
    net = Contraction(eval_solver=solver).eval()
    before = dict(vars(net.implicit))
    for count in (1, 2, 20):
        with evaluations_allowed(net.implicit, count):
            # The iterate of smallest residual is that of the second to last evaluation.
            torch.testing.assert_close(net(X), after(count), atol=0, rtol=0)
            assert net.implicit.forward_stats.num_iter.tolist() == [count, count]
        assert vars(net.implicit) == before
    with pytest.raises(RuntimeError), evaluations_allowed(net.implicit, 2):
        raise RuntimeError
    assert vars(net.implicit) == before


def test_a_budget_is_for_evaluation_and_leaves_the_training_solver():
    net = Contraction(eval_solver=FixedPointIteration(max_iter=3))
    solver = net.implicit.solver
    with evaluations_allowed(net.implicit, 2):
        assert net.implicit.solver is solver and net.implicit.current_solver is solver
        assert net.implicit.eval_solver == FixedPointIteration(max_iter=2)


def test_an_unrolled_net_has_so_many_layers_in_the_block():
    net = Contraction(unrolled_layers=5).eval()
    with evaluations_allowed(net.implicit, 2):
        torch.testing.assert_close(net(X), after(2), atol=0, rtol=0)
    torch.testing.assert_close(net(X), after(5), atol=0, rtol=0)


def test_a_net_of_ones_own_is_found():
    net = Contraction()
    model = nn.ModuleDict({'backbone': net, 'head': nn.Linear(2, 2)})
    assert find_backbone(model) is net


def test_a_model_without_equilibrium_is_told():
    with pytest.raises(ValueError, match='0 MDEQBackbone'):
        find_backbone(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='2 MDEQBackbone'):
        find_backbone(nn.ModuleList([Contraction(), Contraction()]))
