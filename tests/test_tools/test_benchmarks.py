"""tools/benchmarks: ratios of minima over interleaved rounds, and suites that run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdeq_mm.kernels import extension
from tools.benchmarks.timing import Result, interleaved

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / 'tools/benchmarks'


def run(*arguments):
    """Python in a process of its own, where this checkout is installed."""
    path = os.pathsep.join([str(REPO), str(FOLDER)])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ratios_are_those_of_the_minima():
    # The second sample of each is what a neighbour's burst of work makes of it.
    result = Result.of({'a': [2.0, 9.0, 2.5], 'b': [3.0, 3.5, 30.0]}, base='a', caption='work')
    assert result.minimum == {'a': 2.0, 'b': 3.0} and result.median == {'a': 2.5, 'b': 3.5}
    assert result.ratio == {'a': 1.0, 'b': 1.5}
    assert str(result).splitlines()[-1].split() == ['b', '3', '3.5', '1.500']


def test_every_round_runs_every_candidate_once():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in 'abc'}
    samples = interleaved(steps, 2, 'cpu', quiet=True)
    # The first round is not timed.
    assert calls == list('abc') * 3
    assert {name: len(values) for name, values in samples.items()} == dict(a=2, b=2, c=2)
    assert min(min(values) for values in samples.values()) >= 0


@pytest.mark.parametrize('suite, base, count', [('solver', 'f alone', 7), ('step', None, 8)])
def test_suites_write_numbers_and_a_picture(tmp_path, suite, base, count):
    pytest.importorskip('mmpretrain')
    flags = ['--suite', suite, '--repeats', '1', '--batch', '1', '--nfe', '2', '--device', 'cpu']
    run(FOLDER / 'run.py', *flags, '--out', tmp_path)
    result = json.loads((tmp_path / f'{suite}.json').read_text())
    assert result['ratio'][base or result['base']] == 1
    # torchdeq, where it is installed, adds its own.
    assert len(result['minimum']) >= count and result['minimum'] == result['median']
    assert (tmp_path / f'{suite}.png').is_file()
    if suite == 'step':
        limit = result['limit_float32']
        assert limit['seconds'] == pytest.approx(limit['operations'] / limit['rate'])


def test_fused_operations_are_timed_beside_those_of_torch(tmp_path):
    if extension.load():
        pytest.skip(f'no C++ operations: {extension.load()}')
    flags = ['--suite', 'f', '--repeats', '2', '--batch', '1', '--device', 'cpu']
    run(FOLDER / 'run.py', *flags, '--out', tmp_path)
    result = json.loads((tmp_path / 'f.json').read_text())
    shares, least = result['fused_over_native'], result['minimum']
    precisions = sorted({name.split(',')[0] for name in least})
    assert 'float32' in precisions
    for precision in precisions:
        where = f'{precision}, 1 thread'
        both = [
            least[f'{where}, f, {kernel}'] + least[f'{where}, vjp, {kernel}']
            for kernel in ('cpp', 'native')
        ]
        assert shares[f'{where}, f and vjp'] == pytest.approx(both[0] / both[1])
    assert len(shares) == 3 * len(precisions) and (tmp_path / 'f.png').is_file()


def test_two_processes_are_timed_beside_one():
    code = 'import scale; assert len(scale.processes(1, 2, 2)["ratio"]) == 3'
    run('-c', code)


def test_peak_memory_is_what_a_block_holds_above_its_start():
    code = """
import numpy, time
from memory import PeakMemory
with PeakMemory('cpu') as memory:
    block = numpy.ones(2**24)
    # Until the watching thread, which looks every 2 ms, has seen it.
    while memory.peak < 2**27:
        pass
assert memory.peak >= 2**27
"""
    run('-c', code)
