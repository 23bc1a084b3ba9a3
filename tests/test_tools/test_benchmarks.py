"""tools/benchmarks: ratios of minima over interleaved rounds, and suites that run."""

import argparse
import json
import math
import mmap
import os
import re
import signal
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import explicit
import gpu
import learn
import memory
import pytest
import run as benchmark
import scale
import torch
import worker

from mdeq_mm.apis import load_config
from mdeq_mm.kernels import extension
from tools.benchmarks.timing import Result, interleaved

from ..mini_datasets import write_class_folders

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / 'tools/benchmarks'


def run(*arguments):
    """Run a suite in this process."""
    benchmark.main([str(argument) for argument in arguments])


def test_ratios_are_those_of_the_minima():
    # The second sample of each is slowed down by another program's burst of work.
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
def test_suites_write_numbers_and_a_plot(tmp_path, suite, base, count):
    pytest.importorskip('mmpretrain')
    flags = ['--suite', suite, '--repeats', '1', '--batch', '1', '--nfe', '2', '--device', 'cpu']
    run(*flags, '--out', tmp_path)
    result = json.loads((tmp_path / f'{suite}.json').read_text())
    assert result['ratio'][base or result['base']] == 1
    # torchdeq, where it is installed, adds its own.
    assert len(result['minimum']) >= count and result['minimum'] == result['median']
    assert (tmp_path / f'{suite}.png').is_file()
    if suite == 'step':
        limit = result['limit_float32']
        assert limit['seconds'] == pytest.approx(limit['operations'] / limit['rate'])


@pytest.mark.parametrize(
    'net, rows', [pytest.param('large', 4, marks=pytest.mark.slow), ('cityscapes', 3)]
)
def test_time_and_memory_stand_beside_those_of_an_explicit_net(monkeypatch, tmp_path, net, rows):
    """Memory is measured of one step a row, whose process another test starts."""
    pytest.importorskip('mmpretrain')
    pytest.importorskip('mmseg')
    flags = ['--suite', 'step', '--net', net, '--repeats', '1', '--batch', '1', '--device', 'cpu']
    measured = []

    def peak_memory(device, build, *args):
        measured.append(args)
        build(*args)
        return len(measured) * 2**20

    monkeypatch.setattr(explicit, 'peak_memory', peak_memory)
    monkeypatch.setattr(explicit, 'has_bfloat16', lambda device: net == 'large')
    run(*flags, '--crop', 64, 64, '--out', tmp_path)
    result = json.loads((tmp_path / f'step_{net}.json').read_text())
    assert list(result['memory']['minimum'].values()) == list(range(1, len(measured) + 1))
    shapes = {args[2] for args in measured}
    assert shapes == {(1, 3, 32, 32) if net == 'large' else (1, 3, 64, 64)}
    for part in (result, result['memory']):
        names = [name for name in part['ratio'] if not name.endswith('bf16')]
        assert len(names) == rows and part['ratio'][names[0]] == 1 and 'MDEQ' not in names[0]
        assert min(part['minimum'].values()) > 0, part['minimum']
    assert (tmp_path / f'step_{net}.png').is_file()


def test_fused_operations_are_timed_beside_those_of_torch(tmp_path):
    if extension.load():
        pytest.skip(f'no C++ operations: {extension.load()}')
    flags = ['--suite', 'f', '--repeats', '2', '--batch', '1', '--device', 'cpu']
    run(*flags, '--out', tmp_path)
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
        bound = result['convolutions'][where]
        assert 0 < bound['share'] < 1 and 0 < bound['rate'], bound
    assert len(shares) == 3 * len(precisions) and (tmp_path / 'f.png').is_file()


@pytest.mark.slow
def test_two_processes_are_timed_beside_one():
    assert len(scale.processes(1, 2, 2)['ratio']) == 3


def test_peak_memory_is_what_a_block_holds_above_its_start():
    with memory.PeakMemory('cpu') as watched, mmap.mmap(-1, 2**27) as block:
        # Pages of its own: a process may hold freed memory, which a new array would take.
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        # Until the watching thread, which looks every 2 ms, has seen it.
        while watched.peak < 2**26:
            pass
    assert watched.peak >= 2**26


def test_peak_memory_of_a_step_is_taken_in_a_process_of_its_own():
    """A step that ends its process, which this one survives."""
    with pytest.raises(BrokenProcessPool):
        memory.peak_memory('cpu', os._exit, 3)
    assert 'MALLOC_MMAP_THRESHOLD_' not in os.environ


def test_what_fails_stands_in_the_table_and_stops_no_other(tmp_path, monkeypatch):
    """In the place of a GPU, a CPU, on which mmpretrain is broken."""
    (tmp_path / 'mmpretrain').mkdir()
    (tmp_path / 'mmpretrain/__init__.py').write_text('raise OSError("broken | by a pipe")')
    # Both rows are measured in other processes, which look there first.
    monkeypatch.syspath_prepend(str(tmp_path))
    run(
        *('--suite', 'gpu', '--device', 'cpu', '--batch', 1, '--nfe', 2),
        *('--repeats', 2, '--out', tmp_path / 'out'),
        *('--only', '(ResNet|tiny.*mdeq_mm).*contiguous, (–|native), float32$'),
    )
    result = json.loads((tmp_path / 'out/gpu.json').read_text())
    assert result['environment']['device'] == 'cpu' and result['batch'] == 1
    failed, row = result['rows'].values()
    assert failed['error'] == 'OSError: broken | by a pipe'
    assert len(row['seconds']) == 2 and min(row['seconds']) > 0 and row['finite']
    text = (tmp_path / 'out/gpu.md').read_text()
    assert text.startswith(f'# Training step on {result["environment"]["name"]}\n')
    head, line, *rows = [line for line in text.splitlines() if line.startswith('|')]
    columns = head.count('|')
    assert [re.sub(r'\\.', '', r).count('|') for r in (line, *rows)] == [columns] * 3
    first, second = ([cell.strip() for cell in r.split(' | ')] for r in rows)
    assert first[6] == 'failed' and 'broken \\|' in rows[0]
    assert second[:6] == ['| tiny 2+2', 'mdeq_mm', 'contiguous', 'native', 'float32', 'no']
    assert float(second[6]) == pytest.approx(1e3 * min(row['seconds']), rel=1e-3)


def test_every_combination_is_measured_once_on_a_machine(tmp_path):
    every = gpu.rows(24)
    assert len({row.name for row in every}) == len(every)
    count = Counter((row.net, row.nfe, row.code) for row in every)
    nets = ('tiny', (24, 24)), ('large', (18, 20)), ('large', (8, 7))
    # Layouts, kernels, precisions, compiled or not.
    assert count == {
        ('ResNet-101', None, 'mmpretrain'): 2 * 3 * 2,
        **{(*net, 'mdeq_mm'): 2 * 2 * 3 * 2 for net in nets},
        **{(*net, 'torchdeq'): 2 * 3 for net in nets},
    }
    (row,) = [row for row in every if row.name == 'large 8+7, mdeq_mm, channels last, native, bf16']
    net, _ = gpu.build(row, torch.zeros(1, 3, 32, 32))
    assert net.implicit.solver.max_iter == 8 and net.implicit.gradient.solver.max_iter == 7
    assert net.implicit.solver.tol == net.implicit.gradient.solver.tol == 0
    assert net.channels == (32, 64, 128, 256) and net.channels_last is True

    # What was measured before on the same machine stays. Its load is another each time.
    path = Path(tmp_path, 'gpu.json')
    assert gpu._measured_before(path, {}) == {}
    before = dict(environment=dict(name='card', load=1.0), batch=32)
    path.write_text(json.dumps(dict(before, rows=dict(a=1))))
    later = dict(before, environment=dict(name='card', load=2.0))
    assert gpu._measured_before(path, later) == dict(a=1)
    assert gpu._measured_before(path, dict(later, batch=16)) == {}
    assert gpu._measured_before(path, dict(later, environment=dict(name='other', load=1.0))) == {}


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_a_row_that_ends_its_process_or_lasts_too_long_is_told(monkeypatch):
    fork = torch.multiprocessing.get_context('fork')
    # Nothing here needs a process that knows nothing of this one, which takes seconds to begin.
    monkeypatch.setattr(torch.multiprocessing, 'get_context', lambda kind: fork)
    with worker.Worker() as process:
        assert process.run(math.sqrt, 4, limit=300) == (2, None)
        assert process.run(math.sqrt, -1, limit=300)[1].startswith('ValueError: ')
        killed = process.run(signal.raise_signal, signal.SIGKILL, limit=300)
        assert killed == (None, 'the process ended with exit code -9')
        # It waits for a signal that nobody sends.
        assert process.run(signal.pause, limit=0) == (None, 'not done after 0 s')
        assert process.run(math.sqrt, 9, limit=300) == (3, None)


def test_no_gpu_is_told_at_once(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit):
        benchmark.parse_args(['--suite', 'gpu', '--device', 'cuda'])
    assert 'finds no GPU here' in capsys.readouterr().err


@pytest.fixture
def train_to(monkeypatch, tmp_path):
    """Give a function that trains by two recipes, on twenty images, to a wanted accuracy."""
    pytest.importorskip('mmpretrain')
    rows = {
        name: ({**learn.FEW, 'train_cfg.max_epochs': 2, 'model.backbone.drop_rate': rate}, None)
        for name, rate in (('one', 0.0), ('other', 0.1))
    }
    data = write_class_folders(tmp_path / 'digits', dict(train=2, test=1))

    def run(accuracy):
        monkeypatch.setattr(learn, 'candidates', lambda task: rows)
        monkeypatch.setattr(learn, 'TASKS', dict(digits=('mdeq_tiny_digits', accuracy)))
        return learn.measure(argparse.Namespace(repeats=1, task='digits', data_root=str(data)))

    return run


@pytest.mark.parametrize('task', learn.TASKS)
def test_a_recipe_to_learn_by_is_all_its_own(task, tmp_path):
    """Whatever the config of the task trains by."""
    pytest.importorskip('mmpretrain')
    config = str(REPO / f'configs/{learn.TASKS[task][0]}.py')
    penalties = {}
    for name, (options, published) in learn.candidates(task).items():
        cfg = load_config(config, str(tmp_path), options=options)
        backbone, warmup = cfg.model.backbone, cfg.default_hooks.warmup
        penalties[name] = backbone.regularizer is not None
        if name == "the paper's recipe":
            assert (backbone.solver.type, backbone.solver.max_iter) == ('LimitedMemoryBroyden', 18)
            assert backbone.gradient.type == 'ImplicitGradient'
            assert backbone.gradient.solver.max_iter == 20
            assert warmup.unrolled_iters == warmup.softplus_iters == learn.UNROLLED[task]
        elif published is None:
            assert backbone.solver.jitter == (5, 20)
            assert backbone.gradient.type == 'JacobianFreeGradient'
            assert 'unrolled_iters' not in warmup
        else:
            assert backbone.norm_kernel == 'native' and 'unrolled_iters' not in warmup
    assert penalties == {name: 'penalty' in name for name in penalties}


def test_training_ends_at_the_wanted_accuracy(train_to, monkeypatch):
    epochs = []
    monkeypatch.setattr(
        'mmengine.hooks.LoggerHook.after_val_epoch', lambda *call, **_: epochs.append(1)
    )
    result = train_to(0.0)
    # One epoch of each recipe: any accuracy is enough.
    assert len(epochs) == 2
    assert {name: len(values) for name, values in result['samples'].items()} == dict(one=1, other=1)
    assert min(result['minimum'].values()) > 0 and result['missed'] == {}


def test_a_recipe_that_never_gets_there_has_no_time(train_to):
    with pytest.raises(RuntimeError, match=r'no recipe reached 101%: .*one.*other'):
        train_to(101)
