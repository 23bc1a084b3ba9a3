"""A net of one's own around an ImplicitLayer: every hook serves it as it serves MDEQBackbone."""

from functools import partial

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn

from mdeq_mm.hooks import MDEQWarmupHook, SolverStatsHook

from .test_hooks import log_text, run, scalars, warnings_of

CALLS = dict(
    closure=lambda net, x: net.implicit(lambda z: net.f(z, x), torch.zeros_like(x)),
    partial=lambda net, x: net.implicit(partial(net.f, x=x), torch.zeros_like(x)),
    keyword=lambda net, x: net.implicit(f=partial(net.f, x=x), z0=torch.zeros_like(x)),
    sequence=lambda net, x: net.implicit(lambda z: [net.f(z[0], x)], [torch.zeros_like(x)])[0],
)


class OwnNet(BaseModel):
    """z = gain tanh(conv(z)) + x on the image itself; the loss is the mean square."""

    def __init__(self, call='closure', gain=0.5, max_iter=4, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        solver = dict(type='Anderson', max_iter=max_iter, tol=0)
        gradient = dict(type='ImplicitGradient', solver=dict(solver, max_iter=3))
        layer = dict(type='ImplicitLayer', solver=solver, gradient=gradient, **options)
        self.implicit = MODELS.build(layer)
        self.call, self.gain, self.seen = CALLS[call], gain, []

    def f(self, z, x):
        return self.gain * torch.tanh(self.conv(z)) + x

    def forward(self, inputs, mode='tensor'):
        z = self.call(self, torch.stack(inputs))
        self.seen.append((self.training, self.implicit.unrolled_layers))
        return dict(loss=z.pow(2).mean()) if mode == 'loss' else [z.mean()] * len(z)


@pytest.mark.parametrize('call', CALLS)
def test_solver_statistics_of_training_and_validation(call, tmp_path):
    hook = SolverStatsHook(interval=1, spectral_radius=dict(interval=1, iterations=20))
    run(tmp_path, OwnNet(call), [hook])
    rows = scalars(tmp_path)
    train = [row for row in rows if 'train/deq_nfe' in row]
    assert len(train) == 6
    assert {(row['train/deq_nfe'], row['train/deq_bwd_nfe']) for row in train} == {(4, 3)}
    for row in train:
        assert 0 < row['train/deq_residual'] < 1
    validated = [row for row in rows if 'val/deq_nfe' in row]
    assert len(validated) == 2 and all(row['val/deq_nfe'] == 4 for row in validated)
    # |J| <= 0.5 |conv|
    for row in validated:
        assert 0 < row['val/deq_spectral_radius'] < 0.9


def test_a_solver_that_does_not_converge_is_named(tmp_path):
    """f triples what it is given, so that neither it nor its adjoint comes near a solution."""
    model = OwnNet(gain=3.0, max_iter=2)
    nn.init.dirac_(model.conv.weight)
    run(tmp_path, model, [SolverStatsHook(interval=1, warn_residual=0.01, patience=2)])
    warnings = warnings_of(tmp_path)
    assert sum('forward solver ended' in warning for warning in warnings) == 1
    assert sum('backward solver ended' in warning for warning in warnings) == 1
    assert [w for w in warnings if 'ended' in w and 'max_iter' not in w] == []


def test_warm_up_goes_from_unrolled_to_the_equilibrium(tmp_path):
    model = OwnNet()
    run(tmp_path, model, [MDEQWarmupHook(unrolled_iters=4, unrolled_layers=2)])
    assert [layers for training, layers in model.seen if training] == [2, 2, 2, 2, 0, 0]
    assert 'from iteration 4: equilibrium' in log_text(tmp_path)


def test_softplus_is_refused_where_nothing_has_the_switch(tmp_path):
    with pytest.raises(ValueError, match='softplus_iters=2.*flag smooth'):
        run(tmp_path, OwnNet(), [MDEQWarmupHook(unrolled_iters=4, softplus_iters=2)])


@MODELS.register_module()
class SwitchedCell(nn.Module):
    """A cell with the switch, of a class that no hook knows."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.smooth = False
        self.seen = []

    def state_shapes(self, injection):
        return [tuple(injection.shape[1:])]

    def forward(self, states, injection):
        self.seen.append(self.smooth)
        rectify = nn.functional.softplus if self.smooth else torch.relu
        return [0.3 * rectify(self.conv(states[0])) + injection]


class WithCell(BaseModel):
    """A backbone around the cell, as a config makes it."""

    def __init__(self):
        super().__init__()
        solver = dict(type='FixedPointIteration', max_iter=3, tol=0)
        cell = dict(type='SwitchedCell', channels=8)
        gradient = dict(type='JacobianFreeGradient')
        self.backbone = MODELS.build(
            dict(type='MDEQBackbone', channels=(8,), cell=cell, solver=solver, gradient=gradient)
        )
        self.seen = []

    def forward(self, inputs, mode='tensor'):
        cell = self.backbone.cell
        cell.seen.clear()
        (z,) = self.backbone(torch.stack(inputs))
        self.seen.append((self.training, len(cell.seen), set(cell.seen)))
        return dict(loss=z.pow(2).mean()) if mode == 'loss' else [z.mean()] * len(z)


def test_an_own_cell_with_the_switch_is_smoothed(tmp_path):
    model = WithCell()
    hook = MDEQWarmupHook(unrolled_iters=2, unrolled_layers=2, softplus_iters=3)
    run(tmp_path, model, [hook, SolverStatsHook(interval=1)])
    phases = [(calls, smooth) for training, calls, smooth in model.seen if training]
    assert phases == [(2, {True})] * 2 + [(4, {True})] + [(4, {False})] * 3
    assert [row['train/deq_nfe'] for row in scalars(tmp_path) if 'train/deq_nfe' in row] == [3] * 4


def test_penalty_on_the_jacobian_is_a_loss(tmp_path):
    regularizer = dict(type='JacobianRegularizer', weight=0.5)
    hook = dict(type='MDEQRegularizerHook')
    run(tmp_path, OwnNet(regularizer=regularizer), [hook])
    rows = [row for row in scalars(tmp_path) if 'loss_jacobian' in row]
    assert len(rows) == 6 and all(row['loss_jacobian'] > 0 for row in rows)
