"""Parts from outside the package: each is one file that a config imports, and nothing else."""

import sys
import textwrap

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS

from .test_docs import ROOT, fenced
from .test_robustness.test_framework import Segmentor, run

PARTS = dict(
    halfway='''
        from mmengine.registry import TASK_UTILS

        from mdeq_mm.deq import Solver


        @TASK_UTILS.register_module()
        class Halfway(Solver):
            """z <- (z + f(z)) / 2."""

            def init(self, z0):
                return None

            def step(self, state, g, last_step):
                return 0.5 * g
    ''',
    scaled='''
        from mmengine.registry import TASK_UTILS

        from mdeq_mm.deq import JacobianFreeGradient
        from mdeq_mm.options import immutable


        @TASK_UTILS.register_module()
        @immutable
        class ScaledGradient(JacobianFreeGradient):
            """The Jacobian-free gradient, times a factor."""

            factor: float = 2.0

            def __call__(self, f, solution, report=None):
                out = super().__call__(f, solution, report)
                return self.factor * out - (self.factor - 1) * out.detach()
    ''',
    ones='''
        import torch
        from mmengine.registry import TASK_UTILS

        from mdeq_mm.deq import ZeroStart


        @TASK_UTILS.register_module()
        class OneStart(ZeroStart):
            """All ones."""

            def __call__(self, problem, training):
                return torch.ones_like(problem.start)
    ''',
    cells='''
        import torch
        from mmengine.registry import MODELS


        @MODELS.register_module()
        class HalvingCell(torch.nn.Module):
            """z <- w z / 2 + x."""

            def __init__(self):
                super().__init__()
                self.w = torch.nn.Parameter(torch.ones(()))

            def forward(self, states, injection):
                return [0.5 * self.w * states[0] + injection]

            def state_shapes(self, injection):
                return [tuple(injection.shape[1:])]
    ''',
    watching='''
        from mmengine.hooks import Hook
        from mmengine.registry import HOOKS

        from mdeq_mm.deq import implicit_layers


        @HOOKS.register_module()
        class WatchingHook(Hook):
            """Counts evaluations of f over a training."""

            total = 0

            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
                for layer in implicit_layers(runner.model):
                    WatchingHook.total += int(layer.forward_stats.num_iter.sum())
    ''',
)


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A config that imports the five files by ``custom_imports``."""
    for name, text in PARTS.items():
        (tmp_path / f'own_{name}.py').write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ['mdeq_mm', *(f'own_{name}' for name in PARTS)]
    path = tmp_path / 'config.py'
    path.write_text(
        f'custom_imports = dict(imports={names}, allow_failed_imports=False)\n'
        "backbone = dict(type='MDEQBackbone', channels=(8,), cell=dict(type='HalvingCell'),"
        " solver=dict(type='Halfway', max_iter=60, tol=1e-6), start=dict(type='OneStart'),"
        " gradient=dict(type='ScaledGradient', factor=3.0))\n"
        "hooks = [dict(type='WatchingHook')]\n"
    )
    yield Config.fromfile(path)
    for name in PARTS:
        sys.modules.pop(f'own_{name}', None)


def test_a_solver_gradient_start_cell_and_hook_of_ones_own(imported, tmp_path):
    net = MODELS.build(imported.backbone)
    x = torch.randn(2, 3, 16, 16)
    (out,) = net(x)
    # The equilibrium of z / 2 + x is 2 x, from whichever start.
    injection = net.problem(x).injection
    torch.testing.assert_close(out, 2 * injection, rtol=1e-3, atol=1e-4)
    assert net.implicit.start(net.problem(x), True).eq(1).all()
    # d f(z*) / d w = z* / 2, times the factor.
    (grad,) = torch.autograd.grad(out.sum(), net.cell.w)
    torch.testing.assert_close(grad, 1.5 * out.detach().sum(), rtol=1e-3, atol=1e-3)

    run(tmp_path, Segmentor(net), max_iters=2, custom_hooks=list(imported.hooks))
    assert HOOKS.get('WatchingHook').total >= 4


@pytest.fixture
def registered():
    """Forgets what a page registers: the registry is that of the whole process."""
    before = set(MODELS.module_dict)
    yield
    for name in set(MODELS.module_dict) - before:
        MODELS.module_dict.pop(name)


def test_every_snippet_of_the_page_runs_in_turn(registered):
    first, *others = fenced(ROOT / 'docs/own_cell.md', 'python')
    names = {}
    exec(compile(first, 'docs/own_cell.md', 'exec'), names)
    # It learns: predicting nothing costs 1.
    assert names['loss'].item() < 0.3
    assert names['layer'].forward_stats.summary()['converged'] > 0.9
    for snippet in others:
        exec(compile(snippet, 'docs/own_cell.md', 'exec'), names)
    assert names['radius'].shape == (32,) and names['radius'].max() < 1.5
    assert names['features'].shape == (2, 16, 16, 16) == names['mixed'].shape
    x, mix = names['features'], names['neck'].mix
    residual = 0.5 * torch.tanh(mix(names['mixed'])) + x - names['mixed']
    assert residual.norm() / x.norm() < 1e-2
