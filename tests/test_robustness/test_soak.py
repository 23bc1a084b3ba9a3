"""A short soak with a fixed seed, and checks that a soak finds defects."""

import pytest
import torch

from mdeq_mm.deq.layer import ImplicitLayer, SolverStats
from mdeq_mm.models import MDEQBackbone

from ..checks import assert_same

pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')

SEED = 0
# Together they do every action and survive every fault.
CASES = (11, 18, 19, 22, 24, 28, 30, 32, 34)


@pytest.fixture
def run():
    from ..soak import run

    return run


def test_everything_survives(run):
    from ..soak.actions import ACTIONS
    from ..soak.faults import FAULTS

    report = run.soak(SEED, CASES)
    assert not report.failures, str(report)
    assert report.cases == len(CASES) and report.survived == report.faults
    # If one is missing, other cases have to be found, by soak(SEED, range(40)) or so.
    assert set(report.actions) == set(ACTIONS)
    assert set(report.faults) == set(FAULTS)


def test_a_case_follows_from_seed_and_number_alone(run, tmp_path):
    def drawn(seed, index):
        case = run.Case(seed, index, tmp_path)
        return case.describe(), case.images, [p.detach() for p in case.model.parameters()]

    first, torch_state = drawn(3, 4), torch.rand(5)
    again = drawn(3, 4)
    assert first[0] == again[0] and torch.equal(first[1], again[1]) and torch_state.any()
    assert_same(first[2], again[2])
    assert len({first[0], drawn(3, 5)[0], drawn(4, 4)[0]}) == 3


def tied(monkeypatch):
    """Each image's maps depend on the batch's."""
    forward = MDEQBackbone.forward
    monkeypatch.setattr(
        MDEQBackbone, 'forward', lambda net, x: tuple(o + o.mean() for o in forward(net, x))
    )


def leaking(monkeypatch):
    """A forward pass leaks what it made."""
    forward, kept = MDEQBackbone.forward, []

    def keep(net, x):
        kept.append(forward(net, x))
        return kept[-1]

    monkeypatch.setattr(MDEQBackbone, 'forward', keep)


def lying(monkeypatch):
    """Every solve claims to be exact."""
    monkeypatch.setattr(
        SolverStats,
        'of',
        classmethod(lambda cls, s: cls(0 * s.residual, s.num_iter, s.status)),
    )


def forgetful(monkeypatch):
    """A call that fails leaves the next ones unrolled."""
    forward = ImplicitLayer.forward

    def fail(layer, *args, **kwargs):
        try:
            return forward(layer, *args, **kwargs)
        except BaseException:
            layer.unrolled_layers = 2
            raise

    monkeypatch.setattr(ImplicitLayer, 'forward', fail)


@pytest.mark.parametrize(
    'spoil, words',
    [
        (tied, 'differ'),
        (leaking, 'more tensors alive'),
        (lying, 'status'),
        (forgetful, 'the step after the fault'),
    ],
)
def test_what_is_broken_is_found(run, monkeypatch, spoil, words):
    spoil(monkeypatch)

    def stop(report):
        if any(words in trace for *_, trace in report.failures):
            raise KeyboardInterrupt

    report = run.soak(SEED, range(8), progress=stop)
    assert [trace for *_, trace in report.failures if words in trace], str(report)


def test_the_command_reports_and_exits_by_what_it_found(run, monkeypatch, capsys):
    argv = ['--seed', str(SEED), '--case', '2']
    assert run.main(argv) == 0
    out = capsys.readouterr().out
    assert f'seed {SEED}: 1 cases' in out and '0 failures' in out
    lying(monkeypatch)
    assert run.main(argv) == 1
    assert f'FAILED: --seed {SEED} --case 2' in capsys.readouterr().out


def test_growing_memory_is_a_failure(run, monkeypatch):
    report, megabytes = run.Report(SEED), iter([100.0, 150.0, 100 + 2 * run.MAX_GROWTH_MB])
    monkeypatch.setattr(run, 'resident_mb', lambda: next(megabytes))
    for report.cases in (run.SETTLED_AFTER, run.SETTLED_AFTER + 1):
        report.watch_memory()
        assert not report.failures
    report.watch_memory()
    assert len(report.failures) == 1 and f'{2 * run.MAX_GROWTH_MB} MB more' in str(report)
