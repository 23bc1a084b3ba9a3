"""Solvers: closed forms, exact counts, independence of samples, and what happens without a root."""

import pytest
import torch

from mdeq_mm.deq.solvers import (
    Anderson,
    FixedPointIteration,
    LimitedMemoryBroyden,
    Solver,
    Status,
    solve,
)
from mdeq_mm.deq.solvers.base import _Record, _relative
from mdeq_mm.deq.solvers.products import project
from mdeq_mm.deq.solvers.secant import _linear_solve

from ..checks import assert_finite, assert_says
from ..problems import affine_contraction, cosine, expanding_root, rotation, textbook_broyden

ALL = [
    lambda **kw: FixedPointIteration(**kw),
    lambda **kw: FixedPointIteration(damping=0.7, **kw),
    lambda **kw: Anderson(**kw),
    lambda **kw: Anderson(memory=3, damping=0.8, ridge=1e-8, **kw),
    lambda **kw: LimitedMemoryBroyden(**kw),
    lambda **kw: LimitedMemoryBroyden(memory=3, **kw),
    lambda **kw: Anderson(history_dtype='float32', **kw),
    lambda **kw: LimitedMemoryBroyden(history_dtype='bfloat16', **kw),
]
NAMES = ['plain', 'damped', 'anderson', 'anderson-3', 'broyden', 'broyden-3']
NAMES += ['anderson-float32', 'broyden-bfloat16']
every_solver = pytest.mark.parametrize('make', ALL, ids=NAMES)
secant_solver = pytest.mark.parametrize('make', ALL[2:], ids=NAMES[2:])


class Counted:
    """A function that records where it was evaluated."""

    def __init__(self, f):
        self.f, self.points = f, []

    def __call__(self, z):
        self.points.append(z.clone())
        return self.f(z)


@every_solver
@pytest.mark.parametrize('problem', [affine_contraction(), cosine()], ids=['affine', 'cosine'])
def test_finds_the_known_fixed_point(make, problem):
    found = solve(problem.f, problem.start, make(max_iter=400, tol=1e-11))
    torch.testing.assert_close(found.z, problem.solution, atol=1e-9, rtol=1e-9)
    assert set(found.status.tolist()) == {Status.CONVERGED}
    assert (found.residual <= 1e-11).all()


@secant_solver
def test_secant_methods_solve_a_rotation_that_iteration_circles(make):
    problem = rotation()
    plain = solve(problem.f, problem.start, FixedPointIteration(max_iter=50, tol=1e-9))
    assert set(plain.status.tolist()) == {Status.EXHAUSTED}
    found = solve(problem.f, problem.start, make(max_iter=50, tol=1e-9))
    torch.testing.assert_close(found.z, problem.solution, atol=1e-7, rtol=1e-7)


def test_broyden_finds_a_root_that_repels_iteration():
    problem = expanding_root()
    start = torch.full_like(problem.solution, 1.3)
    found = solve(problem.f, start, LimitedMemoryBroyden(max_iter=50, tol=1e-12))
    torch.testing.assert_close(found.z, problem.solution)
    assert not (
        solve(problem.f, start, FixedPointIteration(max_iter=50, tol=1e-12)).status
        == Status.CONVERGED
    ).any()


def test_broyden_with_full_memory_is_the_textbook_method():
    problem = affine_contraction(n=1, d=12)
    f = Counted(lambda z: torch.tanh(2 * problem.f(z)))
    solve(f, problem.start, LimitedMemoryBroyden(max_iter=20, tol=0, memory=20))
    expected = textbook_broyden(
        lambda z: torch.tanh(2 * problem.f(z[None]))[0], problem.start[0], steps=19
    )
    torch.testing.assert_close(torch.cat(f.points), torch.stack(expected), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize('memory', [1, 2, 5])
def test_limited_broyden_matrix_is_that_of_the_latest_pairs(memory):
    """After any number of steps the next one is Broyden's from -I through the last m pairs."""
    problem = affine_contraction(n=1, d=10)
    f = Counted(lambda z: torch.tanh(2 * problem.f(z)))
    solve(f, problem.start, LimitedMemoryBroyden(max_iter=12, tol=0, memory=memory))
    points = [p[0] for p in f.points]
    values = [f.f(p[None])[0] - p for p in points]
    for k in range(1, len(points) - 1):
        jacobian = -torch.eye(10, dtype=torch.float64)
        for i in range(max(0, k - memory), k):
            s, y = points[i + 1] - points[i], values[i + 1] - values[i]
            jacobian += torch.outer(y - jacobian @ s, s) / (s @ s)
        expected = points[k] - torch.linalg.solve(jacobian, values[k])
        torch.testing.assert_close(points[k + 1], expected, atol=1e-8, rtol=1e-6)


def test_anderson_solves_a_linear_problem_in_dimension_plus_two_evaluations():
    problem = affine_contraction(n=4, d=6)
    found = solve(problem.f, problem.start, Anderson(max_iter=8, tol=0, memory=6, ridge=0.0))
    torch.testing.assert_close(found.z, problem.solution, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize('damping', [0.4, 1.0])
@pytest.mark.parametrize('ridge', [0.0, 0.3])
def test_anderson_steps_by_its_formula(damping, ridge):
    """p = b g - (S + b Y) c, where (Y'Y + ridge diag(Y'Y)) c = Y'g over the last m pairs."""
    problem, memory = affine_contraction(n=1, d=10), 3
    f = Counted(lambda z: torch.tanh(2 * problem.f(z)))
    options = dict(memory=memory, damping=damping, ridge=ridge)
    solve(f, problem.start, Anderson(max_iter=9, tol=0, **options))
    points = torch.cat(f.points)
    g = torch.cat([f.f(z[None]) for z in points]) - points
    for k in range(1, len(points) - 1):
        pairs = range(max(0, k - memory), k)
        s = torch.stack([points[i + 1] - points[i] for i in pairs], dim=1)
        y = torch.stack([g[i + 1] - g[i] for i in pairs], dim=1)
        normal = y.T @ y
        c = torch.linalg.solve(normal + ridge * normal.diag().diag(), y.T @ g[k])
        expected = points[k] + damping * g[k] - (s + damping * y) @ c
        torch.testing.assert_close(points[k + 1], expected, atol=1e-8, rtol=1e-6)


def test_memory_of_one_anderson_is_the_secant_method_on_a_scalar():
    def f(z):
        return torch.cos(z)

    counted = Counted(f)
    start = torch.zeros(1, 1, dtype=torch.float64)
    solve(counted, start, Anderson(max_iter=6, tol=0, memory=1, ridge=0.0))
    x = [0.0, 1.0]
    for _ in range(4):
        g = [float(torch.cos(torch.tensor(v, dtype=torch.float64))) - v for v in x[-2:]]
        x.append(x[-1] - g[1] * (x[-1] - x[-2]) / (g[1] - g[0]))
    torch.testing.assert_close(torch.cat(counted.points)[:, 0], torch.tensor(x).double())


@every_solver
@pytest.mark.parametrize('max_iter', [1, 2, 3, 7])
def test_max_iter_is_the_number_of_evaluations(make, max_iter):
    problem = affine_contraction()
    f = Counted(problem.f)
    found = solve(f, problem.start, make(max_iter=max_iter, tol=0))
    assert len(f.points) == max_iter
    assert found.num_iter.tolist() == [max_iter] * 8
    assert found.trace.shape == (max_iter, 8)


@every_solver
def test_batch_equals_single_samples(make):
    """Frozen samples keep their answer while slower batch-mates go on."""
    problem = affine_contraction()
    scale = torch.linspace(0.05, 1, 8, dtype=torch.float64)[:, None]

    def f_of(rows):
        return lambda z: problem.f_rows(z, rows)

    def rows_function(z, rows):
        full = torch.zeros(8, z.shape[1], dtype=z.dtype)
        full[rows] = z
        return (scale * problem.f(full))[rows]

    problem.f_rows = rows_function
    solver = make(max_iter=25, tol=1e-4)
    together = solve(f_of(list(range(8))), problem.start, solver)
    assert len(set(together.num_iter.tolist())) > 1
    for i in range(8):
        alone = solve(f_of([i]), problem.start[:1], solver)
        torch.testing.assert_close(together.z[i], alone.z[0], atol=1e-12, rtol=1e-10)
        assert together.num_iter[i] == alone.num_iter[0]
        assert together.status[i] == alone.status[0]


@every_solver
def test_residual_is_relative_and_per_sample_at_the_returned_iterate(make):
    problem = affine_contraction()
    found = solve(problem.f, problem.start, make(max_iter=6, tol=0))
    fz = problem.f(found.z)
    expected = (fz - found.z).norm(dim=1) / fz.norm(dim=1)
    torch.testing.assert_close(found.residual, expected)
    torch.testing.assert_close(found.residual, found.trace.min(dim=0).values)


@every_solver
def test_start_and_argument_of_f_are_left_alone(make):
    problem = affine_contraction()
    start = torch.full_like(problem.solution, 0.5)
    copy = start.clone()

    def f(z):
        before = z.clone()
        out = problem.f(z)
        torch.testing.assert_close(z, before, atol=0, rtol=0)
        return out

    solve(f, start, make(max_iter=10, tol=0))
    torch.testing.assert_close(start, copy, atol=0, rtol=0)


@every_solver
def test_best_iterate_survives_a_function_that_gets_worse(make):
    calls = []

    def f(z):
        calls.append(z.clone())
        return z + (0.1 if len(calls) == 2 else 5.0 * len(calls))

    found = solve(f, torch.zeros(2, 3), make(max_iter=6, tol=0))
    index = found.trace[:, 0].argmin()
    torch.testing.assert_close(found.z, calls[index], atol=0, rtol=0)


@every_solver
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_non_finite_sample_keeps_its_best_iterate_and_harms_nobody(make, bad):
    problem = affine_contraction()
    calls = []

    def f(z):
        calls.append(None)
        out = problem.f(z)
        if len(calls) >= 4:
            out[3] = bad
        return out

    solver = make(max_iter=30, tol=1e-9)
    found = solve(f, problem.start, solver)
    healthy = solve(problem.f, problem.start, solver)
    others = [i for i in range(8) if i != 3]
    assert found.status[3] == Status.NON_FINITE
    assert_finite(found.z)
    assert (found.z[3] != 0).any() and found.num_iter[3] == 4
    torch.testing.assert_close(found.z[others], healthy.z[others])
    assert found.num_iter[others].tolist() == healthy.num_iter[others].tolist()


@every_solver
def test_a_fixed_budget_ends_where_no_sample_is_left(make):
    """On a CPU, where to ask costs nothing."""
    calls = []

    def f(z):
        calls.append(None)
        return torch.full_like(z, float('nan'))

    solve(f, torch.zeros(3, 4), make(max_iter=30, tol=0))
    assert len(calls) == 1


@every_solver
def test_function_without_fixed_point_ends_finite_and_says_so(make):
    found = solve(torch.exp, torch.zeros(3, 4), make(max_iter=40, tol=1e-6))
    assert_finite(found.z)
    assert Status.CONVERGED not in found.status.tolist()


def test_overflow_does_not_pass_for_convergence():
    found = solve(lambda z: 3 * z + 1, torch.zeros(2, 4), FixedPointIteration(max_iter=2000))
    assert (found.status == Status.NON_FINITE).all() and torch.isfinite(found.z).all()


def test_explosion_is_reported_and_undone():
    def f(z):
        return torch.where(z.abs() > 2, 0.01 * z.sign(), 1e5 * z + 1)

    found = solve(f, torch.zeros(2, 4), FixedPointIteration(max_iter=40, tol=1e-6))
    assert set(found.status.tolist()) == {Status.DIVERGED}
    assert (found.z.abs() <= 2).all()


@every_solver
@pytest.mark.parametrize(
    'f', [lambda z: z, lambda z: 0 * z, lambda z: torch.full_like(z, 3.0)], ids=['id', '0', '3']
)
def test_degenerate_functions_give_finite_fixed_points(make, f):
    """Steps and denominators of exactly zero, and singular small systems, arise here."""
    for tol in (0, 1e-5):
        found = solve(f, torch.zeros(2, 3), make(max_iter=60, tol=tol))
        assert_finite(dict(z=found.z, residual=found.residual))
        torch.testing.assert_close(f(found.z), found.z, atol=1e-4, rtol=1e-4)


@every_solver
def test_state_stays_in_full_precision_when_f_is_in_half(make):
    problem = affine_contraction()

    def f(z):
        return problem.f(z.double()).to(torch.bfloat16)

    found = solve(f, problem.start.float(), make(max_iter=30, tol=0))
    assert found.z.dtype == found.residual.dtype == torch.float32
    assert (found.residual < 2e-2).all()


@pytest.mark.parametrize('cls', [Anderson, LimitedMemoryBroyden])
def test_history_of_low_precision_takes_half_the_memory_and_as_many_calls(cls):
    problem = affine_contraction(n=4, d=200, norm=0.95)
    calls = {}
    for history_dtype, size in ((None, 8), ('bfloat16', 2)):
        solver = cls(max_iter=60, tol=1e-6, memory=5, history_dtype=history_dtype)
        found = solve(problem.f, problem.start, solver, keep_state=True)
        assert set(found.status.tolist()) == {Status.CONVERGED}
        assert found.z.dtype == torch.float64
        assert found.state.tests.element_size() == found.state.images.element_size() == size
        calls[history_dtype] = found.num_iter.double().mean()
    assert calls['bfloat16'] < 1.1 * calls[None]


def test_inverse_transpose_is_that_of_the_broyden_matrix():
    problem = affine_contraction(n=2, d=8)
    f = Counted(lambda z: torch.tanh(problem.f(z)))
    found = solve(
        f, problem.start, LimitedMemoryBroyden(max_iter=7, tol=0, memory=9), keep_state=True
    )
    v = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = found.state.inverse_transpose(v)
    for n in range(2):
        points = [p[n] for p in f.points]
        values = [f.f(p)[n] - p[n] for p in f.points]
        jacobian = -torch.eye(8, dtype=torch.float64)
        # The pair of the last evaluation came too late for a step and is not in the history.
        for i in range(len(points) - 2):
            s, y = points[i + 1] - points[i], values[i + 1] - values[i]
            jacobian += torch.outer(y - jacobian @ s, s) / (s @ s)
        torch.testing.assert_close(got[n], torch.linalg.solve(jacobian.T, v[n]))


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: Anderson(memory=0), ['memory', '>= 1', '0']),
        (lambda: LimitedMemoryBroyden(max_iter=0), ['max_iter', '>= 1', '0']),
        (lambda: LimitedMemoryBroyden(max_iter=2.5), ['max_iter', 'integer', '2.5']),
        (lambda: FixedPointIteration(tol=-1), ['tol', '-1']),
        (lambda: FixedPointIteration(tol='low'), ['tol', "'low'"]),
        (lambda: FixedPointIteration(damping=0), ['damping', '(0, 1]']),
        (lambda: Anderson(ridge=-1.0), ['ridge', '-1.0']),
        (lambda: Anderson(history_dtype='bfloat'), ['history_dtype', "Did you mean 'bfloat16'"]),
    ],
)
def test_bad_value_is_named_with_its_range(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert_says(error, words)


@pytest.mark.parametrize('cls', [FixedPointIteration, Anderson, LimitedMemoryBroyden])
def test_unknown_option_lists_the_valid_ones(cls):
    with pytest.raises(TypeError, match='max_iter') as error:
        cls(max_iters=3)
    assert 'Did you mean' in str(error.value) and 'tol' in str(error.value)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r'\(N, D\)'):
        solve(lambda z: z, torch.zeros(2, 3, 4), FixedPointIteration())
    with pytest.raises(ValueError, match='keep'):
        solve(lambda z: z[:, :2], torch.zeros(2, 3), FixedPointIteration())


def test_every_status_has_a_remedy():
    assert [status for status in Status if not status.remedy] == []


def test_an_own_solver_needs_two_methods():
    class Halfway(Solver):
        def init(self, z0):
            return None

        def step(self, state, g, last_step):
            return 0.5 * g

    problem = cosine()
    found = solve(problem.f, problem.start, Halfway(max_iter=60, tol=1e-10))
    torch.testing.assert_close(found.z, problem.solution)


@every_solver
@pytest.mark.parametrize('tol', [1e-8, 1e-2])
def test_solved_rows_stop_costing_and_change_nothing(make, tol):
    # Contractions of very different speed: rows finish one after the other.
    rates = torch.tensor([0.0, 0.0, 0.0, 0.001, 0.4, 0.8, 0.9], dtype=torch.float64)
    torch.manual_seed(0)
    shift = torch.randn(7, 20, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    sizes = []

    def f_of_rows(rows):
        def f(z):
            sizes.append(len(z))
            return rates[rows, None] * torch.tanh(z @ mix) + shift[rows]

        return f

    f = f_of_rows(torch.arange(7))
    z0 = torch.zeros(7, 20, dtype=torch.float64)
    solver = make(max_iter=60, tol=tol)
    whole, calls = solve(f, z0, solver), len(sizes)
    assert sizes == [7] * calls
    sizes.clear()
    part = solve(f, z0, solver, f_of_rows=f_of_rows)
    assert len(sizes) == calls and sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 7 and sizes[-1] <= 3 and len(set(sizes)) >= 2
    # Rows are left out when at most half of those that f was called with are unsolved.
    assert all(2 * after <= before for before, after in zip(sizes, sizes[1:]) if after < before)
    torch.testing.assert_close(z0, torch.zeros_like(z0), atol=0, rtol=0)
    for name in ('z', 'residual', 'num_iter', 'status', 'trace'):
        got, wanted = getattr(part, name), getattr(whole, name)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    # The state that is asked for is that of all rows.
    kept = solve(f, z0, solver, keep_state=True, f_of_rows=f_of_rows)
    torch.testing.assert_close(kept.z, whole.z, atol=0, rtol=0)
    assert sizes[-1] == 7


def test_rows_that_are_left_alone_may_fail_or_run_out():
    scale = torch.tensor([0.1, 0.1, 0.1, 3.0, float('nan')], dtype=torch.float64)

    def f_of_rows(rows):
        return lambda z: scale[rows, None] * z + 1

    f, z0 = f_of_rows(torch.arange(5)), torch.ones(5, 2, dtype=torch.float64)
    for limit in (1, 2, 12, 40):
        solver = FixedPointIteration(max_iter=limit, tol=1e-3)
        part = solve(f, z0, solver, f_of_rows=f_of_rows)
        whole = solve(f, z0, solver)
        for name in ('z', 'residual', 'num_iter', 'status', 'trace'):
            got, wanted = getattr(part, name), getattr(whole, name)
            torch.testing.assert_close(got, wanted, equal_nan=True)


@every_solver
def test_a_frozen_sample_does_not_move(make):
    """What f is given in its row stays the iterate at which the sample was solved."""
    problem = cosine(n=2)
    start = problem.start
    start[0] = problem.solution[0] + 1e-4
    f = Counted(problem.f)
    found = solve(f, start, make(max_iter=40, tol=1e-3))
    solved = found.num_iter[0].item()
    assert solved == 1 and len(f.points) > 2
    for point in f.points[solved:]:
        torch.testing.assert_close(point[0], f.points[solved - 1][0], atol=0, rtol=0)


@pytest.mark.parametrize('make', [Anderson, LimitedMemoryBroyden])
def test_a_singular_small_system_takes_the_plain_step(make):
    """On a staircase every step is 1 and y = 0: the sixth evaluation stands on the fixed point."""
    start = torch.zeros(2, 1, dtype=torch.float64)
    found = solve(lambda z: (z.floor() + 1).clamp(max=5), start, make(max_iter=20))
    assert [Status(code).name for code in found.status.tolist()] == ['CONVERGED'] * 2
    assert found.num_iter.tolist() == [6, 6]
    torch.testing.assert_close(found.z, torch.full_like(start, 5))


@every_solver
def test_autocast_is_for_f_and_not_for_the_steps(make, monkeypatch):
    # Autocast reaches torch's operators alone.
    monkeypatch.setattr('mdeq_mm.deq.solvers.products._FASTER', {})
    f, plain = (Counted(lambda z: 0.9 * torch.cos(z + torch.arange(40))) for _ in range(2))
    solver = make(max_iter=8, tol=0)
    with torch.autocast('cpu', torch.bfloat16):
        solve(f, torch.zeros(2, 40), solver)
    solve(plain, torch.zeros(2, 40), solver)
    torch.testing.assert_close(f.points, plain.points, atol=1e-6, rtol=1e-5)


def test_a_value_whose_length_overflows_counts_as_not_finite():
    """A finite |f(z) - z| over an infinite |f(z)| is no residual of 0."""
    lengths = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([float('inf'), 4.0, 0.0])
    assert _relative(*lengths).tolist() == [float('inf'), 0.25, 0.0]


def test_what_counts_as_solved_exploded_and_broken():
    """Diverged: 10^4 times |f(z)|, and 10^4 times the first |f(z) - z|; either alone is not."""
    record = _Record(torch.zeros(7, 1), FixedPointIteration(tol=0.5))
    record.update(torch.ones(7), torch.ones(7))
    lengths = torch.tensor(
        [[0.5, 1], [0.51, 1], [1.1e4, 1], [1.1e4, 1.2], [0.9e4, 0.5], [float('nan'), 1], [1, 1e-5]]
    )
    outcome = record.update(*lengths.unbind(1))
    names = 'CONVERGED EXHAUSTED DIVERGED EXHAUSTED EXHAUSTED NON_FINITE EXHAUSTED'.split()
    assert [Status(code).name for code in record.status.tolist()] == names
    assert record.active.tolist() == [name == 'EXHAUSTED' for name in names]
    assert outcome.num_active == 4
    # Samples that have ended count no more evaluations, repeat their residual and cannot improve.
    outcome = record.update(torch.full((7,), 0.1), torch.ones(7))
    assert record.num_iter.tolist() == [3 if name == 'EXHAUSTED' else 2 for name in names]
    assert record.trace[2][0] == 0.5 and record.trace[2][2] == record.trace[1][2]
    assert not outcome.improved[[0, 2, 5]].any()


def test_check_every_looks_at_every_so_many_evaluations():
    f = Counted(lambda z: 0.5 * torch.cos(z))
    start = torch.zeros(2, 3, dtype=torch.float64)
    looking = solve(f, start, FixedPointIteration(max_iter=40, tol=1e-3))
    calls = len(f.points)
    f.points.clear()
    seldom = solve(f, start, FixedPointIteration(max_iter=40, tol=1e-3, check_every=7))
    assert len(f.points) == 7 * -(-calls // 7) and calls % 7
    for name in ('z', 'residual', 'num_iter', 'status'):
        torch.testing.assert_close(getattr(seldom, name), getattr(looking, name), msg=name)


def test_the_linear_solve_of_an_export_pivots(monkeypatch):
    """Without pivoting the first divides by zero and the second by a rounding error."""
    matrix = torch.tensor(
        [
            [[0.0, 2, 1], [1, 0, 3], [4, 1, 0]],
            [[1e-17, 1, 0], [1, 1, 1], [0, 1, 2]],
            [[2, 1, 0], [1, 3, 1], [0, 1, 4]],
        ],
        dtype=torch.float64,
    )
    rhs = torch.arange(1.0, 10, dtype=torch.float64).view(3, 3)
    expected = torch.linalg.solve(matrix, rhs)
    monkeypatch.setattr(torch.compiler, 'is_exporting', lambda: True)
    torch.testing.assert_close(_linear_solve(matrix, rhs), expected)


def test_sums_over_a_history_in_float16_do_not_overflow():
    ones = torch.full((1, 1, 70_000), 1.0, dtype=torch.float16)
    assert project(ones, ones.float()).item() == 70_000


def test_jitter_draws_as_often_up_to_max_iter_as_beyond_it():
    generator = torch.Generator().manual_seed(0)
    solver = FixedPointIteration(max_iter=4, jitter=(3, 9))
    drawn = [solver.drawn(generator) for _ in range(2000)]
    counts = torch.tensor([other.max_iter for other in drawn])
    assert sorted(set(counts.tolist())) == list(range(3, 10))
    assert (counts <= 4).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert {other.jitter for other in drawn} == {None}
    solver = FixedPointIteration(max_iter=4, jitter=(2, 4))
    counts = [solver.drawn(generator).max_iter for _ in range(200)]
    assert sorted(set(counts)) == [2, 3, 4]


def test_the_history_is_as_long_as_it_can_be_used():
    """The first evaluation has no step before it and the last none after it."""
    for max_iter, memory, slots in ((9, 5, 5), (6, 5, 4), (2, 5, 1), (1, 5, 1)):
        state = Anderson(max_iter=max_iter, memory=memory).init(torch.zeros(2, 3))
        assert state.tests.shape == state.images.shape == (2, slots, 3), (max_iter, memory)


def test_a_start_of_integers_is_refused():
    with pytest.raises(ValueError, match='floating-point'):
        solve(lambda z: z, torch.zeros(2, 3, dtype=torch.long), FixedPointIteration())
