"""What the tests assert and start with fails where it should, and says why."""

import os
import sys

import pytest
import torch

from . import forked, processes
from .checks import assert_finite, assert_nonzero, assert_same, assert_says


def test_the_same_is_the_same_bits_and_dtype():
    a = torch.tensor([1.0, float('nan')])
    assert_same(dict(a=[a]), dict(a=(a.clone(),)))
    for other in (a + 1e-7, a.double(), a[:1]):
        with pytest.raises(AssertionError, match='^weights: '):
            assert_same(other, a, 'weights')
    with pytest.raises(AssertionError, match=r"\['a'\]"):
        assert_same(dict(a=a + 1), dict(a=a))


def test_wrong_values_are_named():
    good, bad = torch.ones(2), torch.tensor([1, float('inf')])
    assert_finite(dict(good=good))
    assert_nonzero(dict(good=good, bad=bad))
    with pytest.raises(AssertionError, match=r'^bad: 1 of 2 are \[inf\]'):
        assert_finite(dict(good=good, bad=bad))
    with pytest.raises(AssertionError, match='item 1'):
        assert_finite([good, bad])
    with pytest.raises(AssertionError, match='^zero or missing: a, b$'):
        assert_nonzero(dict(a=0 * good, b=None, good=good))
    assert_says('one two', ['one', 'two'])
    with pytest.raises(AssertionError, match=r"^\['two'\] not in: one$"):
        assert_says(ValueError('one'), ['one', 'two'])


def test_a_process_that_fails_shows_what_it_printed(capsys):
    code = 'import sys; print("out"); print("err", file=sys.stderr); sys.exit(3)'
    with pytest.raises(AssertionError) as error:
        processes.run_python('-c', code)
    assert_says(error, ['exit status 3', 'stdout ---\nout', 'stderr ---\nerr'])
    assert processes.run_python('-c', code, expect=3).stdout == 'out\n'
    assert processes.run_python('-c', code, expect=None).returncode == 3
    # Shown as well where a test fails at what it does with the output.
    assert 'stderr ---\nerr' in capsys.readouterr().out
    code = 'print("begun", flush=True); import signal; signal.pause()'
    with pytest.raises(AssertionError) as error:
        processes.run_python('-c', code, limit=1)
    assert_says(error, ['not done after 1 s'])


def end(status):
    print('as', os.environ['NAME'], flush=True)
    os._exit(status)


def wait_for_ever():
    import signal

    print('waits', flush=True)
    signal.pause()


def test_forked_processes_show_what_they_printed_and_leave_none_waiting(tmp_path, capfd):
    pytest.importorskip('mmseg')
    pytest.importorskip('mmpretrain')
    env = dict(NAME='x')
    assert forked.run(end, 3, folder=tmp_path, env=env, expect=3) == 'as x\n'
    pair = [
        forked.start(wait_for_ever, folder=tmp_path, log='rank0.txt'),
        forked.start(end, 1, folder=tmp_path, log='rank1.txt', env=env),
    ]
    with pytest.raises(AssertionError) as error:
        forked.finish(pair)
    assert_says(error, ['rank1.txt: exit status 1, wanted 0', '--- rank1.txt ---\nas x'])
    assert not pair[0].is_alive()
    assert 'NAME' not in os.environ and sys.stdout is not None
