"""Options: what is refused, and the default of every option that users rely on."""

import inspect
import math
import re

import pytest

from mdeq_mm import deq, hooks, layers, models
from mdeq_mm.options import check_choice, check_flag, check_int, check_kind, check_number

SOLVER = dict(max_iter=30, tol=1e-3, check_every=1, jitter=None)
SECANT = dict(SOLVER, memory=5, history_dtype=None)
DEFAULTS = {
    deq.FixedPointIteration: dict(SOLVER, damping=1.0),
    deq.Anderson: dict(SECANT, damping=1.0, ridge=1e-6),
    deq.LimitedMemoryBroyden: SECANT,
    deq.TruncatedGradient: dict(steps=5, damping=0.5),
    deq.SharedInverseGradient: dict(steps=0, max_growth=1.3),
    deq.PhantomGradient: dict(steps=5, damping=0.5),
    deq.JacobianRegularizer: dict(probability=1.0, samples=1),
    deq.spectral_radius: dict(iterations=50),
    hooks.MDEQWarmupHook: dict(unrolled_iters=0, unrolled_layers=5, softplus_iters=0),
    hooks.SolverStatsHook: dict(interval=10, warn_residual=0.1, patience=20, spectral_radius=None),
    hooks.NonFiniteGradientHook: dict(max_in_a_row=50),
    hooks.MDEQRegularizerHook: dict(
        weight_step=0.0, step_interval=None, begin_iter=0, end_iter=None
    ),
    layers.VariationalDropout2d: dict(drop_rate=0.5),
    layers.MDEQGroupNorm: dict(num_groups=8, eps=1e-5, affine=True, kernel='auto'),
    models.NeuralODEBackbone: dict(
        in_channels=3, hidden_channels=64, augment_channels=0, tol=1e-3, steps=0, init_cfg=None
    ),
}


@pytest.mark.parametrize('owner', DEFAULTS, ids=lambda owner: owner.__name__)
def test_an_option_left_out_has_its_default(owner):
    parameters = list(inspect.signature(owner).parameters.values())
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert found == DEFAULTS[owner]
    if len(found) == len(parameters) and isinstance(owner, type):
        made = owner()
        kept = {name: getattr(made, name) for name in found if hasattr(made, name)}
        assert kept == {name: found[name] for name in kept}


@pytest.mark.parametrize('value', [True, False, '1', None, 1.5, 0])
def test_what_is_no_integer_of_at_least_the_minimum_is_refused(value):
    with pytest.raises(ValueError, match=f'Owner: name must be an integer >= 1, got {value!r}'):
        check_int('Owner', 'name', value, 1)


@pytest.mark.parametrize('value', [True, False, '1', None, -0.1, 1.1, float('nan')])
def test_what_is_no_number_of_the_interval_is_refused(value):
    with pytest.raises(ValueError, match=r'Owner: name must be a number in \[0, 1\], got'):
        check_number('Owner', 'name', value, 0, 1)


def test_the_ends_of_an_interval_are_in_it_unless_it_is_open():
    assert check_int('Owner', 'name', 1, 1) == 1
    assert [check_number('Owner', 'name', end, 0, 1) for end in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match=r'in \(0, 1\], got 0'):
        check_number('Owner', 'name', 0, 0, 1, open_low=True)
    with pytest.raises(ValueError, match=r'in \[0, 1\), got 1'):
        check_number('Owner', 'name', 1, 0, 1, open_high=True)


@pytest.mark.parametrize('value', [0, 1, 'True', None])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(ValueError, match=f'must be True or False, got {value!r}'):
        check_flag('Owner', 'name', value)


def test_a_choice_and_a_kind_name_what_is_valid():
    with pytest.raises(ValueError, match="one of .'left', 'right'., got 'rigth'.*mean 'right'"):
        check_choice('Owner', 'name', 'rigth', ('left', 'right'))
    with pytest.raises(TypeError, match='Owner: name must be a int, got None'):
        check_kind('Owner', 'name', None, int)


# What an owner needs beside the option that is tried.
LAYER = dict(solver=deq.Anderson(), gradient=deq.JacobianFreeGradient())
BACKBONE = dict(channels=(8,), stem_strides=(1,), expansion=1)
NECK = dict(in_channels=(8,), head_channels=(8,), out_channels=8)
SECANTS = [deq.Anderson, deq.LimitedMemoryBroyden]
SOLVERS = [deq.FixedPointIteration, *SECANTS]
DAMPED = [deq.TruncatedGradient, deq.PhantomGradient]
# Owner, option, the least integer that it takes, and its needs.
INTEGERS = [
    *((owner, 'max_iter', 1, {}) for owner in SOLVERS),
    *((owner, 'check_every', 1, {}) for owner in SOLVERS),
    *((owner, 'memory', 1, {}) for owner in SECANTS),
    *((owner, 'steps', 1, {}) for owner in DAMPED),
    (deq.SharedInverseGradient, 'steps', 0, {}),
    (deq.PreviousStart, 'motion', 0, {}),
    (deq.JacobianRegularizer, 'samples', 1, dict(weight=1)),
    (deq.ImplicitLayer, 'unrolled_layers', 0, LAYER),
    (hooks.MDEQWarmupHook, 'unrolled_iters', 0, {}),
    (hooks.MDEQWarmupHook, 'unrolled_layers', 1, {}),
    (hooks.MDEQWarmupHook, 'softplus_iters', 0, {}),
    (hooks.SolverStatsHook, 'interval', 1, {}),
    (hooks.SolverStatsHook, 'patience', 1, {}),
    (hooks.NonFiniteGradientHook, 'max_in_a_row', 1, {}),
    (hooks.MDEQRegularizerHook, 'step_interval', 1, {}),
    (hooks.MDEQRegularizerHook, 'begin_iter', 0, {}),
    (hooks.MDEQRegularizerHook, 'end_iter', 0, {}),
    (models.MDEQBackbone, 'in_channels', 1, BACKBONE),
    (models.MDEQBackbone, 'expansion', 1, BACKBONE),
    (models.MDEQBackbone, 'frozen_stages', -1, BACKBONE),
    (models.MDEQFuseNeck, 'out_channels', 1, NECK),
    (models.PresentClasses, 'num_classes', 1, {}),
    (models.NeuralODEBackbone, 'in_channels', 1, {}),
    (models.NeuralODEBackbone, 'hidden_channels', 1, {}),
    (models.NeuralODEBackbone, 'augment_channels', 0, {}),
    (models.NeuralODEBackbone, 'steps', 0, {}),
]
# Owner, option, the interval in its message, its needs, numbers in it and numbers outside.
NUMBERS = [
    *(
        (owner, 'damping', '(0, 1]', {}, [1e-3, 1], [0, 1.001, -0.5])
        for owner in (deq.FixedPointIteration, deq.Anderson, *DAMPED)
    ),
    *((owner, 'tol', '[0, inf)', {}, [0, 2.0], [-1e-9]) for owner in SOLVERS),
    (deq.Anderson, 'ridge', '[0, inf)', {}, [0, 2.0], [-1e-9]),
    (deq.SharedInverseGradient, 'max_growth', '[0, inf)', {}, [0, 0.5, 5.0], [-0.1]),
    (deq.JacobianRegularizer, 'weight', '[0, inf)', {}, [0, 0.5, 9.0], [-0.1]),
    (deq.JacobianRegularizer, 'probability', '[0, 1]', dict(weight=1), [0, 1], [-0.1, 1.1]),
    (hooks.SolverStatsHook, 'warn_residual', '[0, inf)', {}, [0, 0.5, 5.0], [-0.1]),
    (
        hooks.MDEQRegularizerHook,
        'weight_step',
        '[0, inf)',
        dict(step_interval=1),
        [0, 0.5, 5.0],
        [-0.1],
    ),
    (layers.VariationalDropout2d, 'drop_rate', '[0, 1)', {}, [0, 0.999], [-0.1, 1]),
    (models.MDEQBackbone, 'drop_rate', '[0, 1)', BACKBONE, [0, 0.999], [-0.1, 1]),
    (models.NeuralODEBackbone, 'tol', '(0, inf)', {}, [1e-9, 2.0], [0, -1e-9]),
]
FLAGS = [
    (deq.PreviousStart, 'history', {}),
    (deq.ImplicitLayer, 'skip_solved', LAYER),
    (models.MDEQBackbone, 'norm_eval', BACKBONE),
]

# Owner, option, class of the part, and the owner's needs.
KINDS = [
    (deq.ImplicitLayer, 'solver', deq.Solver, LAYER),
    (deq.ImplicitLayer, 'gradient', deq.Gradient, LAYER),
    (deq.ImplicitLayer, 'start', deq.ZeroStart, LAYER),
    (deq.ImplicitLayer, 'eval_solver', deq.Solver, LAYER),
    (deq.ImplicitLayer, 'regularizer', deq.JacobianRegularizer, LAYER),
    (deq.ImplicitGradient, 'solver', deq.Solver, {}),
]


def named(case):
    return f'{case[0].__name__}.{case[1]}'


def assert_refused(owner, option, needs, value, wanted):
    message = f'{owner.__name__}: {option} must be {wanted}, got {value!r}.'
    with pytest.raises(ValueError, match=re.escape(message)):
        owner(**{**needs, option: value})


@pytest.mark.parametrize('case', INTEGERS, ids=named)
def test_the_least_integer_of_an_option_is_taken_and_named_where_one_is_less(case):
    owner, option, least, needs = case
    owner(**{**needs, option: least})
    for value in (least - 1, least + 0.5, True):
        assert_refused(owner, option, needs, value, f'an integer >= {least}')


@pytest.mark.parametrize('case', NUMBERS, ids=named)
def test_the_interval_of_an_option_is_taken_to_its_ends_and_named_beyond(case):
    owner, option, interval, needs, inside, outside = case
    for value in inside:
        owner(**{**needs, option: value})
    for value in (*outside, math.nan, True, '1'):
        assert_refused(owner, option, needs, value, f'a number in {interval}')


@pytest.mark.parametrize('case', FLAGS, ids=named)
def test_a_switch_takes_true_and_false_alone(case):
    owner, option, needs = case
    for value in (True, False):
        owner(**{**needs, option: value})
    for value in (0, 'False', None):
        assert_refused(owner, option, needs, value, 'True or False')


@pytest.mark.parametrize('case', KINDS, ids=named)
def test_a_part_of_another_kind_is_named(case):
    owner, option, kind, needs = case
    message = f"{owner.__name__}: {option} must be a {kind.__name__}, got 'Andersen'."
    with pytest.raises(TypeError, match=re.escape(message)):
        owner(**{**needs, option: 'Andersen'})


def test_groups_that_do_not_divide_name_the_layer():
    with pytest.raises(ValueError, match='MDEQGroupNorm'):
        layers.MDEQGroupNorm(12, 5)
