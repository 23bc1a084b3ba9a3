"""Hostile, truncated and missing files; wrong settings."""

import os
import pickle
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

import tools.test
import tools.train
from tools.analysis_tools import accuracy_vs_nfe, inference, plot_convergence, warm_start
from tools.model_converters import mdeq_to_mm, publish

from ..checks import assert_same, assert_says
from ..mini_datasets import write_cityscapes

pytest.importorskip('mmseg')

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
default_scope = 'mmseg'
custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)
data_root = 'cityscapes'
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=False),
    dataset=dict(
        type='CityscapesDataset',
        data_root=data_root,
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
        pipeline=pipeline,
    ),
)
solver = dict(type='FixedPointIteration', max_iter=2)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 64)),
    backbone=dict(
        type='MDEQBackbone',
        channels=(8, 8),
        expansion=1,
        solver=solver,
        gradient=dict(type='ImplicitGradient', solver=solver),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=8,
        in_index=0,
        channels=8,
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        num_classes=19,
    ),
    test_cfg=dict(mode='whole'),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1))
custom_hooks = [dict(type='IterationSeedHook')]
log_level = 'ERROR'
"""


class Payload:
    """Makes a folder when an unprotected loader reads it."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    return write_cityscapes(root / 'cityscapes', size=(32, 64))


@pytest.fixture
def here(tmp_path, data, monkeypatch):
    """A folder with a config and the data set it wants, as working directory."""
    (tmp_path / 'seg.py').write_text(CONFIG)
    shutil.copytree(data, tmp_path / 'cityscapes')
    monkeypatch.chdir(tmp_path)
    # The tools force safe loading by it; restored for the tests that come after.
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    return tmp_path


@pytest.fixture
def train(here):
    return tools.train.main


def pretrained(path):
    return [
        '--cfg-options',
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={path}',
    ]


def cut(path, target, share):
    content = path.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize('zipped', [True, False])
def test_pretrained_weights_that_would_run_code_are_refused(train, here, zipped, monkeypatch):
    content = dict(state_dict=dict(weight=torch.ones(1)), meta=Payload(here / 'executed'))
    torch.save(content, here / 'evil.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises((SystemExit, pickle.UnpicklingError)):
        train(['seg.py', *pretrained('evil.pth')])
    assert not (here / 'executed').exists()
    assert not list(here.rglob('iter_*.pth'))
    # The payload is a real one.
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    torch.load(here / 'evil.pth', weights_only=False)
    assert (here / 'executed').exists()


# Every tool that loads a checkpoint, but the converter, which returns its error.
LOADERS = {
    tools.train: ['seg.py', '--cfg-options', 'load_from=evil.pth'],
    tools.test: ['seg.py', 'evil.pth'],
    inference: ['image.png', 'seg.py', 'evil.pth'],
    plot_convergence: ['seg.py', 'evil.pth'],
    accuracy_vs_nfe: ['seg.py', 'evil.pth'],
    warm_start: ['seg.py', 'evil.pth', '.', '--frames', '2', '--window', '32', '32'],
    publish: ['seg.py', 'evil.pth'],
}


def test_every_tool_that_takes_a_checkpoint_is_tried():
    """A tool that starts to load files must be added to the list above."""
    scripts = [p for p in (ROOT / 'tools').rglob('*.py') if not p.name.startswith('_')]
    # A study resumes from its own checkpoints, the benchmark of learning saves none.
    scripts = [p for p in scripts if p.stem not in ('study', 'learn')]
    loading = {p.stem for p in scripts if re.search('checkpoint', p.read_text(), re.IGNORECASE)}
    tried = {Path(tool.__file__).stem for tool in (*LOADERS, mdeq_to_mm)}
    assert loading == tried


@pytest.mark.parametrize('place', ['state_dict', 'meta', 'optimizer'])
@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('tool', LOADERS, ids=lambda tool: tool.__name__)
def test_a_payload_is_refused_by_every_tool(here, tool, zipped, place):
    content = {'state_dict': dict(weight=torch.ones(1)), place: Payload(here / 'executed')}
    torch.save(content, here / 'evil.pth', _use_new_zipfile_serialization=zipped)
    cv2.imwrite(str(here / 'image.png'), np.zeros((32, 64, 3), np.uint8))
    with pytest.raises(SystemExit, match='evil.pth.* was refused: it names .*mkdir'):
        tool.main(LOADERS[tool])
    assert not (here / 'executed').exists() and not (here / 'work_dirs').exists()


def test_a_payload_under_the_key_of_a_weight_is_refused_by_the_converter(here, capsys):
    state_dict = {'stage0.weight': torch.ones(1), 'conv1.weight': Payload(here / 'executed')}
    torch.save(state_dict, here / 'evil.pth')
    assert mdeq_to_mm.main(['evil.pth', 'out.pth']) == 1
    message = capsys.readouterr().err
    assert 'evil.pth' in message and 'mkdir' in message and 'Nothing was written' in message
    assert not (here / 'executed').exists() and not (here / 'out.pth').exists()


@pytest.mark.parametrize('share', [0.0, 0.3, 0.99])
def test_truncated_checkpoints_are_named_and_stay_as_they_are(train, here, share, capsys):
    runner = train(['seg.py', '--work-dir', 'work'])
    whole, broken = here / 'work/iter_1.pth', here / 'broken.pth'
    cut(whole, broken, share)
    before = broken.read_bytes()
    for argv in (['--resume', 'broken.pth'], ['--cfg-options', 'load_from=broken.pth']):
        with pytest.raises(SystemExit, match='broken.pth.*not a checkpoint'):
            train(['seg.py', *argv])
    assert mdeq_to_mm.main(['broken.pth', 'out.pth']) == 1
    assert 'broken.pth' in capsys.readouterr().err
    assert broken.read_bytes() == before and not (here / 'out.pth').exists()
    assert runner.iter == 1


def test_automatic_resume_names_a_truncated_only_checkpoint(train, here):
    train(['seg.py', '--work-dir', 'work'])
    latest = here / 'work/iter_1.pth'
    cut(latest, latest, 0.7)
    before = latest.read_bytes()
    with pytest.raises(SystemExit, match='iter_1.pth.*Is the file whole.*without --resume'):
        train(['seg.py', '--work-dir', 'work', '--resume'])
    assert latest.read_bytes() == before


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'removed', 'unnamed', 'nothing named'])
def test_automatic_resume_takes_the_checkpoint_before_a_damaged_one(train, here, capsys, damage):
    argv = ['seg.py', '--work-dir', 'work', '--cfg-options', 'train_cfg.max_iters=2']
    expected = train(argv).model.state_dict()
    work, latest = here / 'work', here / 'work/iter_2.pth'
    # Things that look like later checkpoints but cannot be resumed.
    torch.save(dict(state_dict={}, meta=dict(iter=9)), work / 'best_mIoU_iter_9.pth')
    (work / 'iter_8.pth').write_bytes(b'')
    if damage in ('truncated', 'empty'):
        cut(latest, latest, dict(truncated=0.7, empty=0)[damage])
    elif damage == 'removed':
        latest.unlink()
    elif damage == 'unnamed':
        (work / 'last_checkpoint').unlink()
    else:
        (work / 'last_checkpoint').write_text('')
    capsys.readouterr()
    resumed = train([*argv, '--resume'])
    (warning,) = re.findall(r'WARNING: --resume: .*', capsys.readouterr().err)
    whole = 2 if 'named' in damage else 1
    assert f'iter_{whole}.pth; all after iteration {whole} is trained again' in warning
    assert ('last_checkpoint' if 'named' in damage else 'iter_2.pth') in warning
    for name, value in resumed.model.state_dict().items():
        assert_same(value, expected[name], name)


def test_automatic_resume_does_not_step_over_a_payload(train, here):
    train(['seg.py', '--work-dir', 'work', '--cfg-options', 'train_cfg.max_iters=2'])
    torch.save(dict(state_dict=Payload(here / 'executed')), here / 'work/iter_2.pth')
    with pytest.raises(SystemExit, match='iter_2.pth.* was refused'):
        train(['seg.py', '--work-dir', 'work', '--resume'])
    assert not (here / 'executed').exists()


@pytest.mark.parametrize('foreign', [False, True])
def test_automatic_resume_of_nothing_starts_at_the_beginning(train, here, foreign):
    """Jobs that may be restarted pass --resume from the start."""
    if foreign:
        (here / 'work').mkdir()
        torch.save(dict(state_dict=dict(weight=torch.ones(1))), here / 'work/start.pth')
    assert train(['seg.py', '--work-dir', 'work', '--resume']).iter == 1
    assert (here / 'work/iter_1.pth').is_file()


@pytest.mark.parametrize('content', ['truncated', 'missing', 'payload'])
def test_pretrained_weights_are_checked_by_name_before_anything_is_built(train, here, content):
    path = here / 'start.pth'
    if content == 'truncated':
        torch.save(dict(state_dict=dict(weight=torch.ones(1000))), path)
        cut(path, path, 0.5)
    elif content == 'payload':
        torch.save(dict(state_dict=Payload(here / 'executed')), path)
    with pytest.raises(SystemExit, match='start.pth'):
        train(['seg.py', *pretrained('start.pth')])
    assert not (here / 'executed').exists() and not (here / 'work_dirs').exists()


@pytest.mark.parametrize(
    'option, words',
    [
        ('model.backbone.solver.type=Andersen', ['Anderson']),
        ('model.backbone.solver.max_iters=3', ['max_iter']),
        ('model.backbone.solver.max_iter=0', ['max_iter', '>= 1']),
        ('model.backbone.gradient.solver.tol=-1', ['tol', '-1']),
        ('model.backbone.channels=(8,9)', ['9 channels', '8 groups']),
        ('model.backbone.drop_rates=0.1', ['drop_rate']),
        ('model.backbone.norm_cfg.type=BN', ['GN']),
    ],
)
def test_config_errors_come_before_the_data(train, here, monkeypatch, option, words):
    from mmseg.datasets import CityscapesDataset

    def loaded(self):
        raise AssertionError('The data set was read before the model was built.')

    monkeypatch.setattr(CityscapesDataset, 'load_data_list', loaded)
    with pytest.raises((SystemExit, TypeError, ValueError, KeyError)) as error:
        train(['seg.py', '--cfg-options', option])
    assert_says(error, words)


def test_a_missing_label_is_named(train, here):
    """The folders exist but one file does not: the first batch that needs it names it."""
    (label,) = (here / 'cityscapes/gtFine/train').rglob('*_000001_*')
    label.unlink()
    with pytest.raises(FileNotFoundError, match=label.name):
        train(['seg.py'])


def test_a_config_is_code_and_says_so_by_failing_where_it_is_wrong(here):
    """A misspelt base is an error of the config's own name, not of a data set."""
    (here / 'child.py').write_text("_base_ = './sge.py'\n")
    with pytest.raises((FileNotFoundError, SystemExit), match='sge.py'):
        tools.train.main(['child.py'])
    assert Config.fromfile('seg.py').model.backbone.type == 'MDEQBackbone'


def test_an_empty_folder_is_no_data_set(train, here):
    """What an interrupted unpacking leaves behind."""
    folder = here / 'cityscapes/leftImg8bit/train'
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(SystemExit, match='wants the folder cityscapes/leftImg8bit/train.*empty'):
        train(['seg.py'])
