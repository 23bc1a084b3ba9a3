"""Metrics by evaluations of f are those of a test for each; radii those of known matrices."""

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from torch import nn

from mdeq_mm.apis import spectral_radii, sweep_evaluations
from mdeq_mm.deq import (
    Anderson,
    FixedPointIteration,
    ImplicitLayer,
    JacobianFreeGradient,
    LimitedMemoryBroyden,
    PreviousStart,
)

COUNTS = (1, 2, 3, 5, 9)


class Affine(nn.Module):
    """The equilibrium of z = Az + x, and the classes that its largest entry names."""

    def __init__(self, solver, matrix=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        if matrix is None:
            matrix = 0.4 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.matrix = nn.Parameter(matrix)
        self.inner = nn.ModuleDict(dict(layer=ImplicitLayer(solver, JacobianFreeGradient())))
        self.seen = []

    def test_step(self, batch):
        x = batch.pop('x')
        z = self.inner['layer'](lambda z: z @ self.matrix.T + x, torch.zeros_like(x))
        self.seen.append(z)
        return [dict(z=row) for row in z]


class MeanOfSquares(BaseMetric):
    """A metric that changes with every digit of the answer."""

    def process(self, data_batch, data_samples):
        self.results += [sample['z'].square().sum().item() for sample in data_samples]

    def compute_metrics(self, results):
        return dict(squares=sum(results) / len(results))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [dict(x=torch.randn(n, 6, generator=generator, dtype=torch.float64)) for n in (4, 4, 1)]


def evaluator():
    return Evaluator([MeanOfSquares()])


@pytest.mark.parametrize(
    'solver',
    [
        Anderson(max_iter=4, memory=3),
        LimitedMemoryBroyden(max_iter=4),
        FixedPointIteration(max_iter=4, jitter=(2, 6)),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_a_sweep_is_a_test_for_each_number_of_evaluations(solver):
    model = Affine(solver)
    rows = sweep_evaluations(model, batches(), evaluator, COUNTS)
    assert [row['evaluations'] for row in rows] == list(COUNTS)
    for row in rows:
        alone = Affine(solver.replace(max_iter=row['evaluations'], tol=0, jitter=None)).eval()
        measure, residuals = evaluator(), []
        for batch in batches():
            with torch.no_grad():
                measure.process(data_samples=alone.test_step(batch), data_batch=batch)
            residuals.append(alone.inner['layer'].forward_stats.residual)
        assert row['squares'] == measure.evaluate(9)['squares']
        assert row['residual'] == pytest.approx(torch.cat(residuals).mean().item(), rel=1e-12)


def test_the_model_is_as_before():
    model = Affine(Anderson(max_iter=4))
    model.inner['layer'].start = PreviousStart()
    layer = model.inner['layer']
    model.inner.eval()
    sweep_evaluations(model, batches(), evaluator, COUNTS)
    spectral_radii(model, batches())
    assert model.inner['layer'] is layer and not layer._forward_hooks
    assert layer.eval_solver is None and isinstance(layer.start, PreviousStart)
    assert model.training and not model.inner.training and not layer.training
    assert not any(z.requires_grad for z in model.seen)


def test_a_failure_leaves_the_model_as_before():
    model = Affine(Anderson(max_iter=4))
    layer = model.inner['layer']
    with pytest.raises(KeyError):
        sweep_evaluations(model, [dict()], evaluator, COUNTS)
    assert model.inner['layer'] is layer and model.training and not layer._forward_hooks


def test_no_solve_begins_at_the_last_batch():
    model = Affine(LimitedMemoryBroyden(max_iter=4))
    cold = sweep_evaluations(model, batches(), evaluator, COUNTS)
    model.inner['layer'].start = PreviousStart()
    assert sweep_evaluations(model, batches(), evaluator, COUNTS) == cold


def test_a_sample_that_turns_nan_keeps_its_best_iterate():
    # Each step of plain iteration is 1e200 times the last: the second overflows.
    matrix = 1e200 * torch.eye(6, dtype=torch.float64)
    model = Affine(FixedPointIteration(max_iter=4), matrix)
    rows = sweep_evaluations(model, batches(), evaluator, (1, 40))
    assert rows[0]['squares'] == rows[1]['squares']
    assert rows[0]['residual'] == rows[1]['residual'] == 1


def test_radii_are_the_largest_absolute_eigenvalues():
    # A rotation by a right angle, which shrinks: its eigenvalues are +-0.7 i.
    rotation = torch.tensor([[0.0, -0.7], [0.7, 0.0]], dtype=torch.float64)
    matrix = torch.block_diag(rotation, torch.diag(torch.tensor([0.5, -0.2, 0.1, 0.3]).double()))
    model = Affine(Anderson(max_iter=20, tol=1e-9), matrix)
    radii = spectral_radii(model, batches(), evaluations=30, iterations=60)
    torch.testing.assert_close(radii, torch.full((9,), 0.7, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize('layers, words', [(0, 'no equilibrium'), (2, '2 equilibria')])
def test_only_one_equilibrium_can_be_swept(layers, words):
    model = nn.ModuleList([Affine(Anderson()) for _ in range(layers)])
    with pytest.raises(ValueError, match=words):
        sweep_evaluations(model, [], evaluator, COUNTS)


def test_an_unrolled_net_has_none():
    model = Affine(Anderson())
    model.inner['layer'].unrolled_layers = 3
    with pytest.raises(ValueError, match='unrolls 3 layers'):
        spectral_radii(model, [])
