"""Killed while training, then resumed: equal to an uninterrupted run, to the last bit.

Each run is a process of its own.
"""

import functools
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from .. import forked
from ..mini_datasets import write_cityscapes, write_class_folders

pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')

REPO = Path(__file__).resolve().parents[2]
BACKBONE = """
    backbone=dict(
        type='MDEQBackbone',
        channels=(4, 4),
        expansion=1,
        drop_rate=0.4,
        norm_cfg=dict(type='GN', num_groups=2),
        stem_norm_cfg=dict(type='BN'),
        solver=dict(type='Anderson', max_iter=3),
        gradient=dict(type='ImplicitGradient', solver=dict(type='Anderson', max_iter=3)),
    ),
"""
SEGMENTOR = f"""
_base_ = [
    '{REPO}/configs/_base_/datasets/cityscapes_1024x512.py',
    '{REPO}/configs/_base_/runtime_seg.py',
]
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32), seg_pad_val=255),
    {BACKBONE}
    decode_head=dict(
        type='FCNHead',
        in_channels=4,
        in_index=0,
        channels=4,
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        num_classes=19,
    ),
    test_cfg=dict(mode='whole'),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=0.01))
param_scheduler = [dict(type='PolyLR', power=0.9, begin=0, end=7, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=7, val_interval=4)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(checkpoint=dict(interval=2))
"""
CLASSIFIER = f"""
_base_ = [
    '{REPO}/configs/_base_/datasets/digits.py',
    '{REPO}/configs/_base_/runtime_cls.py',
]
model = dict(
    type='ImageClassifier',
    {BACKBONE}
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=4, topk=(1,)),
    train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)),
)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=16, padding=2),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ],
    ),
)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
)
param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=4, by_epoch=True, convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
val_cfg = dict()
test_cfg = dict()
"""
# The warm-up ends after the checkpoint that is resumed.
HOOKS_OF = dict(
    seg="dict(type='MDEQWarmupHook', unrolled_iters=5, unrolled_layers=2, softplus_iters=5)",
    cls="dict(type='MDEQWarmupHook', unrolled_iters=8, unrolled_layers=2), dict(type='EMAHook')",
)
CONFIGS = dict(seg=SEGMENTOR, cls=CLASSIFIER)
SEED = ['randomness.seed=7']
KILLED = -signal.SIGKILL


@HOOKS.register_module()
class KillAtIteration(Hook):
    """``kill -9`` before an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class KillWhileWriting(Hook):
    """``kill -9`` when half of a file is on the disk, whatever its suffix."""

    def __init__(self, name, times=1):
        self.name, self.times = name, times

    def before_train(self, runner):
        whole = LocalBackend.put

        def put(backend, obj, filepath):
            if Path(filepath).name.startswith(self.name):
                self.times -= 1
                if self.times == 0:
                    whole(backend, obj[: len(obj) // 2], filepath)
                    os.kill(os.getpid(), signal.SIGKILL)
            whole(backend, obj, filepath)

        LocalBackend.put = put


def train_here(argv):
    """What a process does: train.py's main."""
    # Every process begins with the state of one server, and would draw the same seed for its run.
    np.random.seed(len(argv))
    import train

    train.main(argv)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    return dict(
        seg=write_cityscapes(root / 'cityscapes', size=(32, 64), num_train=5, num_val=1),
        cls=write_class_folders(root / 'digits', dict(train=2, test=1)),
    )


def run(folder, data, task, *flags, kill='', work_dir='work', workers=0, options=()):
    """Train in a process of its own, which a hook may ``kill``."""
    hooks = ', '.join(filter(None, (HOOKS_OF[task], kill)))
    (folder / f'{task}.py').write_text(f'{CONFIGS[task]}custom_hooks = [{hooks}]\n')
    loaders = [f'val_dataloader.{key}' for key in ('num_workers=0', 'persistent_workers=False')]
    loaders += [f'train_dataloader.num_workers={workers}', f'data_root={data[task]}']
    loaders += ['crop_size=(32,32)'] if task == 'seg' else []
    argv = [f'{task}.py', '--work-dir', work_dir, *flags]
    argv += ['--cfg-options', *loaders, *options]
    forked.run(train_here, argv, folder=folder, expect=KILLED if kill else 0)


@pytest.fixture
def train(tmp_path, data):
    """Give ``run`` in a folder of the test's own."""
    return functools.partial(run, tmp_path, data)


@pytest.fixture
def log(tmp_path):
    """Give a function that reads what the last run printed."""
    return lambda: (tmp_path / 'log.txt').read_text()


@pytest.fixture
def work(tmp_path):
    return tmp_path / 'work'


@pytest.fixture(scope='module')
def whole(tmp_path_factory, data):
    """The folder of a segmentation run that nothing interrupted."""
    folder = tmp_path_factory.mktemp('whole')
    run(folder, data, 'seg', options=SEED)
    return folder / 'work'


def load(path):
    return torch.load(path, weights_only=False)


def differences(a, b, name=''):
    """Names of the leaves in which two checkpoints differ."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        return [d for key in a for d in differences(a[key], b[key], f'{name}.{key}')]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f'{name}.{i}')]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]


def assert_same_training(got, expected):
    """Weights, their average, the optimizer's state and the schedule are the same bits."""
    got, expected = load(got), load(expected)
    assert got['meta']['iter'] == expected['meta']['iter']
    parts = [key for key in expected if key not in ('meta', 'message_hub')]
    assert {'state_dict', 'optimizer', 'param_schedulers'} <= set(parts)
    for part in parts:
        assert differences(got[part], expected[part], part) == []


def test_segmentation_killed_between_checkpoints(train, log, work, whole):
    """By iterations, resumed right after a validation, before the end of the warm-up."""
    kill = "dict(type='KillAtIteration', iteration=5)"
    train('seg', kill=kill, options=SEED)
    assert (work / 'last_checkpoint').read_text().endswith('iter_4.pth')
    train('seg', '--resume', options=SEED)
    assert 'resumed epoch: 0, iter: 4' in log()
    assert_same_training(work / 'iter_7.pth', whole / 'iter_7.pth')


def test_segmentation_with_loader_processes(train, work):
    """Augmentation goes on where it was, in processes that know nothing of the checkpoint."""
    kill = "dict(type='KillAtIteration', iteration=5)"
    train('seg', kill=kill, workers=2, options=SEED)
    train('seg', '--resume', workers=2, options=SEED)
    train('seg', work_dir='whole', workers=2, options=SEED)
    assert_same_training(work / 'iter_7.pth', work.with_name('whole') / 'iter_7.pth')


@pytest.mark.parametrize('workers', [0, 2])
def test_classification_killed_in_an_epoch(train, work, workers):
    """By epochs, without a seed of its own: the resumed run takes that of the killed one."""
    kill = "dict(type='KillAtIteration', iteration=7)"
    train('cls', kill=kill, workers=workers)
    assert (work / 'last_checkpoint').read_text().endswith('epoch_2.pth')
    train('cls', '--resume', workers=workers)
    options = [f'randomness.seed={load(work / "epoch_4.pth")["meta"]["seed"]}']
    train('cls', work_dir='whole', workers=workers, options=options)
    assert_same_training(work / 'epoch_4.pth', work.with_name('whole') / 'epoch_4.pth')


def test_killed_while_writing_the_only_checkpoint(train, log, work, whole):
    """The previous checkpoint is still there, and no half-written file has the name of one."""
    options = [*SEED, 'default_hooks.checkpoint.max_keep_ckpts=1']
    kill = "dict(type='KillWhileWriting', name='iter_4.pth')"
    train('seg', kill=kill, options=options)
    assert [path.name for path in work.glob('iter_*.pth')] == ['iter_2.pth']
    assert [path.name for path in work.glob('*.part')] == ['iter_4.pth.part']
    train('seg', '--resume', options=options)
    assert 'resumed epoch: 0, iter: 2' in log()
    assert_same_training(work / 'iter_7.pth', whole / 'iter_7.pth')
    assert [path.name for path in work.glob('iter_*.pth*')] == ['iter_7.pth']


def test_killed_while_a_checkpoint_is_written_over(train, log, work):
    """After a validation with a new best score MM writes the last checkpoint once more."""
    kill = "dict(type='KillWhileWriting', name='epoch_1.pth', times=2)"
    train('cls', kill=kill, options=SEED)
    assert load(work / 'epoch_1.pth')['meta']['epoch'] == 1
    train('cls', '--resume', options=SEED)
    assert 'resumed epoch: 1' in log()
    train('cls', work_dir='whole', options=SEED)
    assert_same_training(work / 'epoch_4.pth', work.with_name('whole') / 'epoch_4.pth')


def test_a_truncated_latest_checkpoint_is_named_and_the_one_before_goes_on(train, log, work, whole):
    shutil.copytree(whole, work)
    latest = work / 'iter_7.pth'
    (work / 'last_checkpoint').write_text(str(latest))
    latest.write_bytes(latest.read_bytes()[:-1000])
    train('seg', '--resume', options=SEED)
    text = ' '.join(log().split())
    words = r"WARNING: --resume: '\S*iter_7.pth' is not a checkpoint .* Going on from \S*iter_6.pth"
    assert re.search(words + '; all after iteration 6 is trained again', text), text
    assert 'resumed epoch: 0, iter: 6' in text
    assert_same_training(latest, whole / 'iter_7.pth')
