"""Hooks inside a real mmengine Runner on a toy task."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from mmengine import dist
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mdeq_mm.deq import spectral_radius
from mdeq_mm.hooks import MDEQWarmupHook, SolverStatsHook

from ..checks import assert_says


def solver(max_iter, tol=0):
    return dict(type='LimitedMemoryBroyden', max_iter=max_iter, tol=tol)


class Toy(BaseModel):
    """A backbone whose mean output is the loss; ``poison`` makes the loss nan."""

    def __init__(self, poison=False, **backbone):
        super().__init__()
        self.poison = poison
        self.backbone = MODELS.build(
            dict(
                type='MDEQBackbone',
                channels=(8, 8),
                expansion=1,
                solver=solver(4),
                gradient=dict(type='ImplicitGradient', solver=solver(3)),
                **backbone,
            )
        )
        self.seen = []

    def forward(self, inputs, mode='tensor'):
        outs = self.backbone(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        implicit, cell = self.backbone.implicit, self.backbone.cell
        self.seen.append((self.training, implicit.unrolled_layers, cell.smooth))
        if mode == 'loss':
            return dict(
                loss=sum(o.pow(2).mean() for o in outs) * (float('nan') if self.poison else 1)
            )
        return [outs[0].mean()] * len(outs[0])


class Noise(Dataset):
    METAINFO = {}

    def __init__(self, n=8):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return dict(inputs=torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)))


def run(tmp_path, model, hooks, max_iters=6, val_interval=3, resume=False, **options):
    loader = dict(
        batch_size=2, sampler=dict(type='InfiniteSampler'), dataset=Noise(), num_workers=0
    )
    val = dict(
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=Noise(4),
        num_workers=0,
    )
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=loader,
        val_dataloader=val,
        val_evaluator=Evaluator([]),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=val_interval),
        val_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3),
        ),
        log_processor=dict(by_epoch=False),
        custom_hooks=hooks,
        experiment_name=f'toy{tmp_path.name}{resume}',
        resume=resume,
        **options,
    )
    runner.train()
    return runner


def train_phases(model):
    return [(unrolled, smooth) for training, unrolled, smooth in model.seen if training]


def log_text(tmp_path):
    return '\n'.join(p.read_text() for p in Path(tmp_path).rglob('*.log'))


def scalars(tmp_path):
    rows = []
    for path in Path(tmp_path).rglob('scalars.json'):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def test_warmup_goes_from_unrolled_softplus_to_the_equilibrium(tmp_path):
    model = Toy()
    hook = MDEQWarmupHook(unrolled_iters=4, unrolled_layers=2, softplus_iters=2)
    run(tmp_path, model, [hook])
    assert train_phases(model) == [(2, True)] * 2 + [(2, False)] * 2 + [(0, False)] * 2
    validated = [unrolled for training, unrolled, _ in model.seen if not training]
    assert validated == [2, 2, 0, 0]
    text = log_text(tmp_path)
    assert 'from iteration 0: 2 unrolled layers until 4, softplus until 2' in text
    assert 'from iteration 4: equilibrium, ReLU' in text
    assert 'Validating the network in training: 2 unrolled layers until 4, ReLU' in text


def test_warmup_phase_follows_the_iteration_of_a_resumed_run(tmp_path):
    hook = dict(type='MDEQWarmupHook', unrolled_iters=4, unrolled_layers=2)
    run(tmp_path, Toy(), [hook], max_iters=3)
    model = Toy()
    run(tmp_path, model, [hook], max_iters=6, resume=True)
    assert train_phases(model) == [(2, False), (0, False), (0, False)]


def test_warmup_returns_to_an_unrolled_configuration(tmp_path):
    model = Toy(unrolled_layers=3)
    run(tmp_path, model, [MDEQWarmupHook(unrolled_iters=2, unrolled_layers=1)], max_iters=3)
    assert train_phases(model) == [(1, False), (1, False), (3, False)]
    assert model.backbone.implicit.unrolled_layers == 3


def test_training_that_ends_in_the_warmup_leaves_the_model_as_it_was(tmp_path):
    model = Toy()
    hook = MDEQWarmupHook(unrolled_iters=9, unrolled_layers=2, softplus_iters=9)
    run(tmp_path, model, [hook], max_iters=1)
    assert train_phases(model) == [(2, True)]
    assert (model.backbone.implicit.unrolled_layers, model.backbone.cell.smooth) == (0, False)


def test_warmup_without_an_mdeq_is_an_error(tmp_path):
    class Plain(BaseModel):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, inputs, mode='tensor'):
            return dict(loss=self.layer.weight.sum())

    with pytest.raises(ValueError, match='found no equilibrium in the model: neither MDEQBackbone'):
        run(tmp_path, Plain(), [MDEQWarmupHook(unrolled_iters=2)])


def test_solver_stats_reach_log_line_and_scalars(tmp_path):
    run(tmp_path, Toy(), [dict(type='SolverStatsHook', interval=1)])
    rows = scalars(tmp_path)
    train = [r for r in rows if 'train/deq_nfe' in r]
    assert train and all(r['train/deq_nfe'] == 4 and r['train/deq_bwd_nfe'] == 3 for r in train)
    assert {r['train/deq_converged'] for r in train} == {0}
    assert min(r['train/deq_residual'] for r in train) >= 0
    validated = [r for r in rows if 'val/deq_nfe' in r]
    assert validated and validated[-1]['val/deq_nfe'] == 4
    assert [key for key in validated[-1] if key.startswith('train/')] == []
    assert 'train/deq_nfe: 4.0000' in log_text(tmp_path)


def test_a_test_logs_its_own_solver_and_radius(tmp_path):
    hook = SolverStatsHook(spectral_radius=dict(interval=2, iterations=5))
    runner = run(
        tmp_path,
        Toy(),
        [hook],
        max_iters=1,
        test_dataloader=dict(
            batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False), dataset=Noise(3)
        ),
        test_evaluator=Evaluator([]),
        test_cfg=dict(),
    )
    measured = []
    hook._radius._measure = lambda layer, args, kwargs, out: measured.append(len(out))
    runner.test()
    scalars = {
        name: float(buffer.current())
        for name, buffer in runner.message_hub.log_scalars.items()
        if name.startswith('test/test/deq')
    }
    assert set(scalars) == {
        f'test/test/deq_{field}' for field in ('nfe', 'residual', 'converged', 'failed')
    }
    assert scalars['test/test/deq_nfe'] == 4
    # The first and the third of three batches.
    assert len(measured) == 2 and not runner.model.backbone.implicit._forward_hooks


def test_means_are_those_of_the_processes_that_solved(monkeypatch):
    """One of two processes had a solve; the means of the table are half of its values."""
    reduced = []

    def all_reduce(values, op):
        reduced.append(op)
        values /= 2

    monkeypatch.setattr(dist, 'is_distributed', lambda: True)
    monkeypatch.setattr(dist, 'get_comm_device', lambda: torch.device('cpu'))
    monkeypatch.setattr(dist, 'all_reduce', all_reduce)
    model = Toy().train()
    model([torch.randn(3, 16, 16)] * 2, mode='loss')
    hook, runner = SolverStatsHook(), SimpleNamespace(model=model)
    alone = hook._collect(runner, ('forward', 'backward'), reduce=False)
    # Processes may have other numbers of batches to evaluate: nobody waits for another.
    hook.after_val_iter(runner, 0)
    assert not reduced and alone['deq_nfe'] == 4 and 'deq_bwd_nfe' not in alone
    together = hook._collect(runner, ('forward', 'backward'))
    assert reduced == ['mean'] and together == pytest.approx(alone)


def test_unrolled_iterations_log_no_solver(tmp_path):
    hooks = [MDEQWarmupHook(unrolled_iters=10), SolverStatsHook(interval=1)]
    run(tmp_path, Toy(), hooks)
    assert [key for row in scalars(tmp_path) for key in row if 'deq_nfe' in key] == []


def warnings_of(tmp_path):
    lines = log_text(tmp_path).splitlines()
    return [line for line in lines if 'WARNING' in line and ('solver' in line or 'loss' in line)]


def test_unconverged_solvers_are_warned_about_once_each_with_a_remedy(tmp_path):
    hook = SolverStatsHook(interval=1, warn_residual=1e-6, patience=3)
    run(tmp_path, Toy(), [hook])
    forward, backward = warnings_of(tmp_path)
    assert 'forward solver' in forward and 'Raise max_iter' in forward
    assert 'backward solver' in backward and 'gradient.solver.max_iter' in backward
    assert '3 reports in a row' in forward
    assert '3 reports in a row' in backward


def test_reports_above_the_limit_count_in_a_row_only(tmp_path):
    """Two above, one below, two above: at a patience of three that is no reason to warn."""
    hook, runner = SolverStatsHook(interval=1, patience=3), MagicMock()
    for residual in (1.0, 1.0, 1e-3, 1.0, 1.0):
        hook._watch(runner, dict(deq_residual=residual, deq_nfe=3.0), {})
    runner.logger.warning.assert_not_called()
    hook._watch(runner, dict(deq_residual=1.0, deq_nfe=3.0), {})
    runner.logger.warning.assert_called_once()


def test_spectral_radius_of_validation_is_that_of_the_equilibria(tmp_path):
    model = Toy()
    # From another vector each time: under a complex pair 40 of them still differ by 5 percent.
    iterations = 200
    hook = SolverStatsHook(interval=1, spectral_radius=dict(interval=1, iterations=iterations))
    run(tmp_path, model, [hook])
    logged = [r for r in scalars(tmp_path) if 'val/deq_spectral_radius' in r][-1]
    expected = []
    with torch.no_grad():
        for start in (0, 2):
            x = torch.stack([Noise()[start + i]['inputs'] for i in range(2)])
            problem = model.backbone.eval().problem(x)
            z = problem.flat(model.backbone.implicit(problem))
            expected.append(spectral_radius(problem, z, iterations))
    assert not model.backbone.implicit._forward_hooks
    assert logged['val/deq_spectral_radius'] == pytest.approx(
        torch.cat(expected).mean().item(), rel=0.02
    )


def test_nan_loss_is_told_apart_from_solver_failure(tmp_path):
    run(tmp_path / 'loss', Toy(poison=True), [SolverStatsHook(interval=1)], max_iters=1)
    text = '\n'.join(warnings_of(tmp_path / 'loss'))
    assert 'The loss is not finite; the equilibrium is finite' in text

    model = Toy()
    # A weight that MM's initialization leaves alone.
    conv = model.backbone.cell.blocks[0].conv1
    torch.nn.init.constant_(conv.parametrizations.weight.original0, float('nan'))
    run(tmp_path / 'solver', model, [SolverStatsHook(interval=1)], max_iters=1)
    text = '\n'.join(warnings_of(tmp_path / 'solver'))
    assert 'forward solver diverged or turned non-finite on 2 samples' in text
    assert 'The loss is not finite; the solver failed as well' in text


def test_nan_loss_of_an_unrolled_net_has_no_solver_to_blame():
    runner = MagicMock()
    SolverStatsHook()._watch(runner, {}, dict(loss=torch.tensor(float('nan'))))
    (message,) = runner.logger.warning.call_args.args
    assert 'The loss is not finite' in message and 'solver' not in message


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: MDEQWarmupHook(unroled_iters=3), ['unrolled_iters', 'softplus_iters']),
        (lambda: MDEQWarmupHook(unrolled_iters=-1), ['unrolled_iters', '-1']),
        (lambda: SolverStatsHook(interval=0), ['interval', '0']),
        (
            lambda: SolverStatsHook(spectral_radius=dict(interval=0)),
            ['SolverStatsHook.spectral_radius: interval must be an integer >= 1, got 0'],
        ),
        (
            lambda: SolverStatsHook(spectral_radius=dict(iterations=1)),
            ['SolverStatsHook.spectral_radius: iterations must be an integer >= 2, got 1'],
        ),
    ],
)
def test_wrong_option_names_the_choices(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert_says(error, words)
