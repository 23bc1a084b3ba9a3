"""What every public class and tool does where nothing is said: a change is a change for users."""

import argparse
import inspect
import runpy
import sys
from pathlib import Path

import pytest
from mmengine.hooks import CheckpointHook
from torch import nn

from mdeq_mm import deq, hooks, layers, models
from mdeq_mm.deq import ImplicitGradient, LimitedMemoryBroyden, ZeroStart

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
SOLVER = dict(max_iter=30, tol=1e-3, check_every=1, jitter=None)
BROYDEN = dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3)
GROUP_NORM = dict(type='GN', num_groups=8)
F = dict(drop_rate=0.0, weight_norm=True, upsample='nearest', norm_cfg=GROUP_NORM)
DEFAULTS = dict(
    # Of deq.
    Anderson=dict(SOLVER, memory=5, damping=1.0, ridge=1e-6, history_dtype=None),
    FixedPointIteration=dict(SOLVER, damping=1.0),
    ImplicitLayer=dict(
        start=ZeroStart(), unrolled_layers=0, eval_solver=None, skip_solved=False, regularizer=None
    ),
    JacobianRegularizer=dict(probability=1.0, samples=1),
    LimitedMemoryBroyden=dict(SOLVER, memory=5, history_dtype=None),
    PhantomGradient=dict(steps=5, damping=0.5),
    PreviousStart=dict(history=False, motion=0),
    SharedInverseGradient=dict(steps=0, max_growth=1.3),
    Solver=SOLVER,
    TruncatedGradient=dict(steps=5, damping=0.5),
    solve=dict(keep_state=False, f_of_rows=None, state=None),
    spectral_radius=dict(iterations=50),
    # Of hooks.
    MDEQRegularizerHook=dict(weight_step=0.0, step_interval=None, begin_iter=0, end_iter=None),
    MDEQWarmupHook=dict(unrolled_iters=0, unrolled_layers=5, softplus_iters=0),
    NonFiniteGradientHook=dict(max_in_a_row=50),
    SolverStatsHook=dict(interval=10, warn_residual=0.1, patience=20, spectral_radius=None),
    # Of layers.
    MDEQGroupNorm=dict(num_groups=8, eps=1e-5, affine=True, kernel='auto'),
    VariationalDropout2d=dict(drop_rate=0.5),
    # Of models.
    JointHead=dict(cls_neck=None, init_cfg=None),
    MDEQBackbone=dict(
        F,
        arch=None,
        in_channels=3,
        channels=None,
        expansion=None,
        stem_strides=None,
        stem_norm_cfg=dict(type='BN'),
        norm_kernel='auto',
        cell=None,
        solver=BROYDEN,
        gradient=dict(type='ImplicitGradient', solver=BROYDEN),
        start=dict(type='ZeroStart'),
        regularizer=None,
        unrolled_layers=0,
        eval_solver=None,
        skip_solved=False,
        compile_cell=False,
        channels_last='auto',
        out_indices=None,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    MDEQCell=dict(F, expansion=5, norm_kernel='auto'),
    MDEQFuseNeck=dict(norm_cfg=dict(type='BN'), init_cfg=None),
    NeuralODEBackbone=dict(
        in_channels=3, hidden_channels=64, augment_channels=0, tol=1e-3, steps=0, init_cfg=None
    ),
)
# Options without a default, or that a caller of deq alone never gives.
WITHOUT = {
    *('Gradient', 'ImplicitGradient', 'IterationSeedHook', 'JacobianFreeGradient', 'Part'),
    *('CellProblem', 'FunctionProblem', 'Problem', 'Solution', 'SolverStats', 'Status'),
    *('ZeroStart', 'implicit_layers', 'problem_of', 'ScaleOutput', 'build_norm'),
    *('check_groups', 'fusible', 'has_hooks', 'is_group_norm', 'reset_masks', 'PresentClasses'),
    # Theirs are those of the classes they are derived from.
    *('MDEQCheckpointHook', 'MDEQConv2d'),
}
PUBLIC = {
    name: getattr(module, name)
    for module in (deq, hooks, layers, models)
    for name in module.__all__
    if callable(getattr(module, name))
}


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_every_public_name_is_listed():
    assert set(PUBLIC) == set(DEFAULTS) | WITHOUT


@pytest.mark.parametrize('name', DEFAULTS)
def test_defaults(name):
    assert defaults(PUBLIC[name]) == DEFAULTS[name]


def test_defaults_that_are_others():
    assert ImplicitGradient().solver == LimitedMemoryBroyden()
    assert defaults(hooks.MDEQCheckpointHook) == defaults(CheckpointHook)
    assert defaults(layers.MDEQConv2d) == defaults(nn.Conv2d)


# Without what the parsers of all tools say, None and False.
FLAGS = {
    'analysis_tools/accuracy_vs_nfe.py': dict(
        nfe=[2, 4, 8, 12, 16, 20, 26], out='work_dirs/accuracy_vs_nfe.png'
    ),
    'analysis_tools/get_flops.py': {},
    'analysis_tools/inference.py': dict(opacity=0.6),
    'analysis_tools/plot_convergence.py': dict(
        batches=5, nfe=30, memory=10, out='work_dirs/convergence.png'
    ),
    'analysis_tools/warm_start.py': dict(
        count=4,
        frames=8,
        window=(160, 224),
        pixels=(1, 2, 4),
        tol=(1e-2, 1e-3),
        max_iter=60,
        out='work_dirs/warm_start.json',
    ),
    'benchmarks/run.py': dict(
        repeats=5,
        batch=32,
        net='tiny',
        task='digits',
        nfe=24,
        only='',
        crop=(512, 1024),
        out='work_dirs/benchmark',
    ),
    'dataset_converters/camvid.py': {},
    'dataset_converters/digit_scenes.py': dict(num_train=1000, num_val=100, size=64, seed=0),
    'dataset_converters/digits.py': {},
    'demo.py': dict(data_root='data/digit_scenes', work_dir='work_dirs/mdeq_demo_digit_scenes'),
    'model_converters/mdeq_to_mm.py': {},
    'model_converters/publish.py': dict(out_dir='mdeq_mm/weights'),
    'studies/study.py': dict(out='docs/studies', work_dir='work_dirs/studies'),
    'test.py': dict(wait_time=2, interval=1, launcher='none', local_rank=0),
    'train.py': dict(launcher='none', local_rank=0),
}
# What a machine has decides these.
OF_THE_MACHINE = ('device', 'jobs')


class Found(Exception):
    """Carries the parser out of a script."""


def test_every_tool_is_listed():
    scripts = [path for path in TOOLS.rglob('*.py') if path.name[0] != '_']
    with_parser = {path for path in scripts if 'ArgumentParser(' in path.read_text()}
    assert {str(path.relative_to(TOOLS)) for path in with_parser} == set(FLAGS)


@pytest.mark.parametrize('tool', FLAGS)
def test_defaults_of_a_tool(tool, monkeypatch):
    def stop(self, *args, **kwargs):
        raise Found(self)

    path = TOOLS / tool
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
    monkeypatch.setattr('mdeq_mm.allocation.keep_freed_memory', lambda: False)
    monkeypatch.setattr(sys, 'argv', [str(path)])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(Found) as found:
        runpy.run_path(str(path), run_name='__main__')
    actions = found.value.args[0]._actions
    got = {a.dest: a.default for a in actions if a.dest not in OF_THE_MACHINE}
    nothing = (None, argparse.SUPPRESS)
    assert FLAGS[tool] == {
        name: value
        for name, value in got.items()
        if value not in nothing and value is not False and value != []
    }
