"""Studies: runs on generated images, interrupted and resumed; tables and charts of known runs."""

import importlib
import json
import subprocess
from copy import deepcopy
from functools import cache
from pathlib import Path

import _records
import _report
import _single_run
import _studies
import pytest
import study as study_tool
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import mdeq_mm  # noqa: F401

from ..mini_datasets import write_class_folders
from ..processes import run_python

ROOT = Path(__file__).resolve().parents[2]
NETS = ('mdeq_tiny', 'deq_tiny', 'resnet18_w8', 'node', 'anode')


@pytest.fixture
def run(tmp_path):
    """Give a function that runs the script in this process, on ten images of two classes."""
    data = write_class_folders(tmp_path / 'data', dict(train=5, test=2), num_classes=2, size=8)

    def main(name, *flags, out='out', work_dir='work'):
        places = ['--out', str(tmp_path / out), '--work-dir', str(tmp_path / work_dir)]
        study_tool.main([name, '--data-root', str(data), '--jobs', '0', *places, *flags])

    return main


def result(tmp_path, study, row, seed=0, out='out'):
    return json.loads((tmp_path / out / study / f'{row}_seed{seed}.json').read_text())


# --- Runs -------------------------------------------------------------------------------------


def test_rows_are_trained_and_tested(run, tmp_path, monkeypatch):
    rows = ('jacobian_free', 'penalty')
    run('recipes', '--rows', *rows, '--seeds', '3', '--epochs', '1')
    for row in rows:
        found = result(tmp_path, 'recipes', row, seed=3)
        assert (found['seed'], found['epochs'], found['iterations']) == (3, 1, 1)
        assert (found['training_images'], found['test_images']) == (10, 4)
        assert (found['parameters'], found['threads']) == (160_218, 1)
        (epoch,) = found['history']
        assert epoch['loss'] > 0 and 0 < epoch['cpu_seconds'] == found['cpu_seconds']
        assert epoch['accuracy'] == found['accuracy'] in (0, 25, 50, 75, 100)
        assert [point['evaluations'] for point in found['evaluations']] == list(_studies.COUNTS)
        residuals = [point['residual'] for point in found['evaluations']]
        assert residuals == sorted(residuals, reverse=True) and found['budget'] == 8
        radius = found['spectral_radius']
        assert 0 < radius['mean'] <= radius['largest'] and radius['images'] == 4
        assert torch.__version__.startswith(found['versions']['torch']) and found['processor']
    penalty = result(tmp_path, 'recipes', 'penalty', seed=3)['options']
    assert penalty['model.backbone.regularizer']['type'] == 'JacobianRegularizer'
    # Finished runs are not repeated.
    monkeypatch.setattr('_single_run.run', lambda *args: pytest.fail('trained again'))
    run('recipes', '--rows', *rows, '--seeds', '3', '--epochs', '1')


class Interrupted(Exception):
    """Stands in for a kill."""


def interrupt(monkeypatch, method, call):
    """Interrupt the ``call``-th call of a method of MM's loops, once."""
    kind, name = method.split('.')
    loops = importlib.import_module('mmengine.runner.loops')
    original, calls = getattr(getattr(loops, kind), name), []

    def broken(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Interrupted
        return original(self, *args, **kwargs)

    monkeypatch.setattr(getattr(loops, kind), name, broken)


@pytest.mark.parametrize('method, call', [('EpochBasedTrainLoop.run_iter', 2), ('ValLoop.run', 2)])
def test_an_interrupted_run_ends_as_one_that_was_not(method, call, run, tmp_path, monkeypatch):
    monkeypatch.setattr(_single_run, 'COUNTS', (2, 8))
    flags = ('recipes', '--rows', 'narrow', '--seeds', '0', '--epochs', '2')
    run(*flags, out='whole', work_dir='whole_work')
    with monkeypatch.context() as patch:
        interrupt(patch, method, call)
        with pytest.raises(Interrupted):
            run(*flags)
        assert not (tmp_path / 'out').exists()
    run(*flags)
    found, wanted = (result(tmp_path, 'recipes', 'narrow', out=out) for out in ('out', 'whole'))
    times = [epoch.pop('cpu_seconds') for epoch in found['history']]
    assert times == sorted(times) and found.pop('cpu_seconds') == times[-1]
    wanted.pop('cpu_seconds')
    for epoch in wanted['history']:
        epoch.pop('cpu_seconds')
    assert found == wanted


def test_an_unfinished_run_of_other_settings_is_refused(run, tmp_path, monkeypatch):
    flags = ('recipes', '--rows', 'phantom3', '--seeds', '0')
    with monkeypatch.context() as patch:
        interrupt(patch, 'ValLoop.run', 1)
        with pytest.raises(Interrupted):
            run(*flags, '--epochs', '2')
    with pytest.raises(SystemExit, match=r'epochs 2, not 1: delete the folder, or .*--work-dir'):
        run(*flags, '--epochs', '1')


def test_a_result_of_other_settings_is_refused(run, tmp_path):
    study = _studies.RECIPES
    records = _records
    settings = records.settings_of(study, study.rows['few'], 0, 5)
    records.write_json(tmp_path / 'out/recipes/few_seed0.json', settings)
    with pytest.raises(
        SystemExit, match=r'few_seed0.json .* epochs 5, not 2: delete it, or .*--out'
    ):
        run('recipes', '--rows', 'few', '--seeds', '0', '--epochs', '2')


def test_missing_images_are_named(tmp_path):
    places = ['--out', str(tmp_path), '--work-dir', str(tmp_path), '--data-root', '/nowhere']
    with pytest.raises(SystemExit, match='/nowhere.* by --data-root FOLDER'):
        study_tool.main(['recipes', '--rows', 'few', '--jobs', '0', *places])


def test_explicit_nets_have_an_accuracy_and_no_evaluations(run, tmp_path):
    run('table1', '--rows', 'resnet18', '--seeds', '0', '--epochs', '1')
    found = result(tmp_path, 'table1', 'resnet18')
    assert found['accuracy'] in (0, 25, 50, 75, 100) and found['parameters'] == 176_402
    assert not {'evaluations', 'spectral_radius', 'budget'} & found.keys()


def test_equal_time_is_counted_in_epochs(run, tmp_path):
    records = _records
    with pytest.raises(SystemExit, match='mdeq_seed1.json'):
        run('table1', '--rows', 'resnet18_same_time', '--seeds', '1', '--epochs', '2')
    for name, seconds in (('mdeq', 60.0), ('resnet18', 40.0)):
        path = tmp_path / 'out/table1' / f'{name}_seed1.json'
        records.write_json(path, dict(cpu_seconds=seconds, epochs=2))
    run('table1', '--rows', 'resnet18_same_time', '--seeds', '1', '--epochs', '2')
    found = result(tmp_path, 'table1', 'resnet18_same_time', seed=1)
    assert found['epochs'] == len(found['history']) == 3


def test_tuning_keeps_to_the_training_images(run, tmp_path):
    row, study = 'resnet18_lr0.003_wd0.001', _studies.TUNING
    run('tuning', '--rows', row, '--epochs', '1')
    found = result(tmp_path, 'tuning', row)
    assert (found['training_images'], found['test_images']) == (8, 2)
    settings = _records.settings_of(study, study.rows[row], 0, 1)
    cfg = _single_run.make_config(
        study.rows[row], settings, str(tmp_path / 'data'), tmp_path / 'new'
    )
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (3e-3, 1e-3)
    trained = cfg.train_dataloader.dataset
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_prefix == trained.data_prefix == 'train'
        assert sorted(trained.indices + loader.dataset.indices) == list(range(10))


def test_the_warm_up_is_a_share_of_the_iterations(run, tmp_path):
    study = _studies.RECIPES
    settings = _records.settings_of(study, study.rows['paper'], 0, 40)
    cfg = _single_run.make_config(
        study.rows['paper'], settings, str(tmp_path / 'data'), tmp_path / 'new'
    )
    warmup = cfg.default_hooks.warmup
    # One iteration an epoch here; 3000 of 50 x 391 in the paper.
    assert warmup.unrolled_iters == warmup.softplus_iters == 6
    assert warmup.unrolled_layers == 10
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[0].T_max) == (40, 40)


# --- Processes --------------------------------------------------------------------------------


def test_runs_are_processes_of_one_thread(run, tmp_path, capfd):
    flags = ('--rows', 'resnet18', '--seeds', '0', '--epochs', '1', '--jobs', '2')
    run('table1', *flags)
    assert result(tmp_path, 'table1', 'resnet18')['threads'] == 1
    log = tmp_path / 'work/table1/resnet18_seed0.log'
    assert str(log) in capfd.readouterr().out and 'Epoch(val) [1]' in log.read_text()


def test_a_failed_run_is_named_and_the_others_are_done(run, monkeypatch, tmp_path, capfd):
    started = []

    class Process:
        def __init__(self, command, **options):
            self.row = command[command.index('--rows') + 1]
            started.append((self.row, options['env']['OMP_NUM_THREADS']))

        def wait(self):
            return int(self.row == 'few')

        def terminate(self):
            pytest.fail('nothing was left to stop')

    monkeypatch.setattr(subprocess, 'Popen', Process)
    rows = ('few', 'phantom3', 'phantom5')
    with pytest.raises(SystemExit, match='failed: few_seed0. .*work/recipes'):
        run('recipes', '--rows', *rows, '--seeds', '0', '--jobs', '1')
    assert started == [(row, '1') for row in rows]
    assert 'few_seed0: failed, exit status 1' in capfd.readouterr().out


STOPPED = """
import os, signal, subprocess, sys, threading
sys.path.insert(0, sys.argv[1])
import study

class Process:
    def __init__(self, *args, **options):
        print('started', flush=True)
        self.end = threading.Event()
        os.kill(os.getpid(), signal.SIGTERM)

    def wait(self):
        self.end.wait()
        return -signal.SIGTERM

    def terminate(self):
        print('stopped', flush=True)
        self.end.set()

subprocess.Popen = Process
study.main(['recipes', '--jobs', '1', '--out', sys.argv[2], '--work-dir', sys.argv[2]])
"""


def test_a_stop_stops_what_runs_and_begins_nothing_more(tmp_path):
    done = run_python('-c', STOPPED, ROOT / 'tools/studies', tmp_path, expect=1)
    lines = [line for line in done.stdout.splitlines() if line in ('started', 'stopped')]
    assert lines == ['started', 'stopped']
    assert 'the same command continues' in done.stderr


# --- Tables and charts ----------------------------------------------------------------------


def known_run(row, seed, seconds, accuracies, budget=8):
    """A finished run, as far as tables and charts read it."""
    points = [
        dict(evaluations=count, accuracy=accuracy, residual=1 / count)
        for count, accuracy in accuracies.items()
    ]
    history = [
        dict(epoch=n, loss=1.0 / n, accuracy=40.0 + n + seed, cpu_seconds=seconds * n / 2)
        for n in (1, 2)
    ]
    found = dict(seed=seed, epochs=2, parameters=160_218, history=history)
    found.update(cpu_seconds=seconds, accuracy=history[-1]['accuracy'])
    if points:
        found.update(evaluations=points, budget=budget, spectral_radius=dict(mean=0.5 + seed))
    return found


@pytest.fixture
def known(tmp_path):
    """Give a folder of runs with known numbers."""
    write = _records.write_json
    for seed in (0, 1):
        for row, seconds, budget in (('paper', 1200, 18), ('penalty', 300, 8)):
            accuracies = {8: 50.0 + 2 * seed, 18: 54.0}
            content = known_run(row, seed, seconds, accuracies, budget)
            write(tmp_path / 'recipes' / f'{row}_seed{seed}.json', content)
        write(
            tmp_path / 'table1' / f'resnet18_seed{seed}.json',
            known_run('resnet18', seed, 60.0, {}),
        )
    write(tmp_path / 'table1/mdeq_seed0.json', known_run('mdeq', 0, 600.0, {8: 60.0, 40: 59.5}))
    # Not a run, and another study's row.
    (tmp_path / 'recipes/notes.txt').write_text('')
    write(tmp_path / 'recipes/unknown_seed0.json', known_run('unknown', 0, 1.0, {}))
    return tmp_path


def printed(capsys, folder, study, *flags):
    study_tool.main([study, '--out', str(folder), '--table', *flags])
    lines = capsys.readouterr().out.strip().splitlines()
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def test_the_table_has_means_and_deviations_over_seeds(known, capsys):
    head, rule, *rows = printed(capsys, known, 'recipes')
    assert set(rule) == {'---'} and len({len(line) for line in (head, *rows)}) == 1
    paper, penalty = (dict(zip(head, row)) for row in rows)
    assert paper['seeds'] == penalty['seeds'] == '2'
    assert (paper['CPU min'], penalty['CPU min']) == ('20.0 ± 0.0', '5.0 ± 0.0')
    assert (paper['of the first'], penalty['of the first']) == ('1.00', '0.25')
    # 50 and 52; in bold where the row was trained.
    assert (paper['at 8'], penalty['at 8']) == ('51.0 ± 1.4', '**51.0 ± 1.4**')
    assert (paper['at 18'], penalty['at 18']) == ('**54.0 ± 0.0**', '54.0 ± 0.0')
    assert (paper['residual'], penalty['residual']) == ('0.056 ± 0.000', '0.125 ± 0.000')
    assert penalty['radius'] == '1.00 ± 0.71' and penalty['accuracy'] == '42.5 ± 0.7'


def test_the_table_of_nets_leaves_explicit_ones_without_evaluations(known, capsys):
    head, _, *rows = printed(capsys, known, 'table1')
    resnet, mdeq = (dict(zip(head, row)) for row in rows)
    assert 'of the first' not in head
    assert resnet['at 8'] == resnet['radius'] == ''
    assert mdeq['at 8'] == '**60.0**' and mdeq['at 40'] == '59.5' and mdeq['radius'] == '0.50'


def test_times_that_were_taken_in_turn_are_those_of_the_table(
    run, known, tmp_path, monkeypatch, capsys
):
    seconds = {'paper': iter([[9.0, 3.0], [5.0, 7.0]]), 'penalty': iter([[1.0, 2.0], [3.0, 0.0]])}
    asked = []

    def ratios():
        capsys.readouterr()
        head, _, *rows = printed(capsys, known, 'recipes')
        return [row[head.index('of the first')] for row in rows]

    def time_iterations(row, settings, data_root, work_dir, iterations):
        name = next(name for name in seconds if _studies.RECIPES.rows[name] is row)
        asked.append((name, iterations))
        return next(seconds[name])

    with monkeypatch.context() as patch:
        patch.setattr(_single_run, 'time_iterations', time_iterations)
        run('recipes', '--time', '2', '--rows', *seconds, out='.')
    assert asked == [('paper', 40), ('penalty', 40)] * 2
    # The least of each iteration: 5 and 3 by the one, 1 and 0 by the other.
    times = json.loads((tmp_path / 'recipes/times.json').read_text())
    found = {name: (row['seconds'], row['iterations']) for name, row in times['rows'].items()}
    assert found == dict(paper=(4.0, 2), penalty=(0.5, 2))
    assert ratios() == ['1.00', '0.12']
    # Others stay, but not beside those of another machine.
    with monkeypatch.context() as patch:
        patch.setattr(_single_run, 'time_iterations', lambda *args: [1.0])
        run('recipes', '--time', '1', '--rows', 'penalty', out='.')
        assert ratios() == ['1.00', '0.25']
        patch.setattr(_single_run, 'processor', lambda: 'another')
        run('recipes', '--time', '1', '--rows', 'paper', out='.')
    assert 'recipes/times.json is of another machine' in capsys.readouterr().out
    assert ratios() == ['1.00', '']
    # Without the first row's, or with settings that have changed, minutes are compared.
    times = json.loads((tmp_path / 'recipes/times.json').read_text())
    times['rows']['paper']['warmup_share'] = 0.5
    _records.write_json(tmp_path / 'recipes/times.json', times)
    assert ratios() == ['1.00', '0.25']


@pytest.mark.parametrize('flags', [['--list'], ['--table'], ['--plot']])
def test_timing_goes_alone_and_with_a_first_row(flags, capsys):
    with pytest.raises(SystemExit):
        study_tool.main(['recipes', '--time', '1', *flags])
    with pytest.raises(SystemExit):
        study_tool.main(['table1', '--time', '1'])
    told = capsys.readouterr().err
    assert '--time must be at least 1, and goes without --list' in told
    assert '--time: table1 has no row that the others are compared with' in told


@pytest.mark.parametrize('row, budget', [('few', 8), ('paper', 18)])
def test_iterations_are_timed_at_whole_budgets(row, budget, tmp_path, monkeypatch):
    data = write_class_folders(tmp_path / 'data', dict(train=65, test=1), num_classes=1, size=8)
    runners, study = [], _studies.RECIPES
    build = _single_run.build_runner
    monkeypatch.setattr(
        _single_run, 'build_runner', lambda cfg: runners.append(build(cfg)) or runners[0]
    )
    monkeypatch.setattr('mmengine.runner.ValLoop.run', lambda self: pytest.fail('validated'))
    folder = tmp_path / 'run'
    settings = study_tool.timed_settings(study, study.rows[row])
    seconds = _single_run.time_iterations(study.rows[row], settings, str(data), folder, 1)
    # Of 65 images one batch.
    assert len(seconds) == 1 and seconds[0] > 0 and not [*folder.rglob('*.pth')]
    layer = runners[0].model.backbone.implicit
    # Nets as they begin take fewer evaluations to the tolerance that they are trained with.
    for stats, count in (
        (layer.forward_stats, budget),
        (layer.backward_stats, layer.gradient.solver.max_iter),
    ):
        assert (stats.num_iter == count).all()


def test_some_rows_alone(known, capsys):
    head, _, *rows = printed(capsys, known, 'recipes', '--rows', 'penalty')
    assert len(rows) == 1 and 'of the first' not in head


def test_nothing_finished_is_said(tmp_path):
    with pytest.raises(SystemExit, match='no finished runs in .*recipes'):
        study_tool.main(['recipes', '--out', str(tmp_path), '--table'])


def test_the_chart_of_recipes_is_accuracy_by_evaluations(known, capsys):
    study_tool.main(['recipes', '--out', str(known), '--plot'])
    path = Path(capsys.readouterr().out.strip())
    assert path == known / 'recipes/recipes.png' and path.stat().st_size > 10_000
    report, study = _report, _studies.RECIPES
    (plot,) = report.chart(study, report.read_results(study, known / 'recipes')).axes
    paper, penalty = plot.lines
    assert paper.get_label() == study.rows['paper'].title
    assert penalty.get_xydata().tolist() == [[8, 51], [18, 54]]
    assert len(plot.collections) == 2  # a band each


def test_the_chart_of_nets_is_accuracy_by_epoch_and_by_time(known, tmp_path):
    path = tmp_path / 'new/nets.png'
    study_tool.main(['table1', '--out', str(known), '--plot', str(path)])
    assert path.stat().st_size > 10_000
    report, study = _report, _studies.TABLE1
    left, right = report.chart(study, report.read_results(study, known / 'table1')).axes
    assert left.lines[0].get_xydata().tolist() == [[1, 41.5], [2, 42.5]]
    assert right.lines[0].get_xydata().tolist() == [[0.5, 41.5], [1, 42.5]]
    assert right.lines[1].get_xydata().tolist() == [[5, 41], [10, 42]]


def test_rows_are_listed_with_what_is_done(known, capsys):
    study_tool.main(['recipes', '--out', str(known), '--list'])
    text = capsys.readouterr().out
    assert '2 of 3 done, 5.0 CPU minutes each' in text and 'phantom5: ' in text


def test_an_unknown_row_is_named(capsys):
    with pytest.raises(SystemExit):
        study_tool.main(['table1', '--rows', 'resnet50', '--list'])
    assert 'resnet50: table1 has node, anode' in capsys.readouterr().err


# --- Configs ----------------------------------------------------------------------------------


@cache
def _read(net):
    return Config.fromfile(ROOT / f'configs/{net}_cifar10_5k.py')


def config(net):
    return deepcopy(_read(net))


def build(cfg):
    pytest.importorskip('mmpretrain')
    if cfg.model.backbone.type == 'NeuralODEBackbone':
        pytest.importorskip('torchdiffeq')
    init_default_scope('mmpretrain')
    # mmpretrain's ResNet computes with numbers of tensors while it is built.
    device = 'cpu' if cfg.model.backbone.type == 'ResNet_CIFAR' else 'meta'
    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device(device):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize('net', NETS)
def test_all_nets_are_of_one_size(net):
    count = sum(p.numel() for p in build(config(net)).parameters())
    assert abs(count / 168_300 - 1) < 0.05
    stated = dict(
        mdeq_tiny=160_218, deq_tiny=169_554, resnet18_w8=176_402, node=171_352, anode=172_452
    )
    assert count == stated[net]


@pytest.mark.parametrize('net', NETS[1:])
def test_all_nets_are_trained_and_judged_alike(net):
    cfg, mdeq = config(net), config('mdeq_tiny')
    for one in (cfg, mdeq):
        # Each has its own rates.
        for key in ('lr', 'weight_decay'):
            one.optim_wrapper.optimizer.pop(key)
        one.pop('model')
    assert cfg.to_dict() == mdeq.to_dict()


def test_images_enter_the_net_as_normalized_red_green_blue(tmp_path):
    pytest.importorskip('mmpretrain')
    cv2 = importlib.import_module('cv2')
    importlib.import_module('mmpretrain.datasets')
    cfg = config('mdeq_tiny')
    folder = tmp_path / 'train/cat'
    folder.mkdir(parents=True)
    red, green, blue = 200, 100, 30
    image = torch.tensor([blue, green, red], dtype=torch.uint8).expand(32, 32, 3).numpy()
    cv2.imwrite(str(folder / '0.png'), image)
    init_default_scope('mmpretrain')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        datasets = importlib.import_module('mmengine.registry').DATASETS
        dataset = datasets.build(dict(cfg.train_dataloader.dataset, data_root=str(tmp_path)))
        preprocessor = MODELS.build(dict(cfg.data_preprocessor, type='ClsDataPreprocessor'))
    sample = dataset[0]
    batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']])
    found = preprocessor(batch)['inputs'][0, :, 0, 0]
    mean, std = (torch.tensor(cfg.data_preprocessor[key]) for key in ('mean', 'std'))
    torch.testing.assert_close(found, (torch.tensor([red, green, blue]) - mean) / std)


def test_every_row_makes_a_model_of_its_recipe():
    studies = _studies
    rows = {**studies.RECIPES.rows, **studies.PENALTIES.rows}
    for name, row in rows.items():
        cfg = config('mdeq_tiny')
        cfg.merge_from_dict(json.loads(json.dumps(row.options)))
        implicit = build(cfg).backbone.implicit
        ranges = dict(wide=(5, 20), narrow=(6, 12))
        assert implicit.solver.jitter == ranges.get(name.split('_')[0]), name
        penalized = 'penalty' in name or 'weight' in name
        assert (implicit.regularizer is not None) == penalized, name
        assert implicit.solver.max_iter == (18 if name == 'paper' else 8), name


def test_settings_of_the_rows_are_those_that_configs_have():
    for study in _studies.STUDIES.values():
        for name, row in study.rows.items():
            for option in row.options:
                node = config(row.config.removesuffix('_cifar10_5k'))
                *path, last = option.split('.')
                for key in path:
                    node = node[key]
                known = last in node or last in ('regularizer', 'unrolled_layers')
                assert known, f'{name}: {option}'
