"""Options: what is refused, and the default of every option that users rely on."""

import inspect

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
        in_channels=3, hidden_channels=64, augment_channels=0, tol=1e-3, init_cfg=None
    ),
}


@pytest.mark.parametrize('owner', DEFAULTS, ids=lambda owner: owner.__name__)
def test_an_option_left_out_has_its_default(owner):
    parameters = inspect.signature(owner).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert found == DEFAULTS[owner]


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
