"""Weights to come with the package are reduced from a checkpoint, measured, and written whole."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import mdeq_mm
from mdeq_mm.apis import build_model
from tools.model_converters import publish

from ..checks import assert_same
from ..mini_datasets import write_class_folders

pytest.importorskip('mmpretrain')

REPO = Path(__file__).resolve().parents[2]
CONFIG = f"""
_base_ = ['{REPO}/configs/mdeq_tiny_digits.py']
model = dict(
    backbone=dict(channels=(8, 8), expansion=1, solver=dict(max_iter=2, jitter=None)),
    neck=[
        dict(type='MDEQFuseNeck', in_channels=(8, 8), head_channels=(4, 4), out_channels=16),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(in_channels=16),
)
test_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
log_level = 'ERROR'
"""
META = dict(cfg='epochs = 2', seed=7, dataset_meta=dict(classes=('0', '1')))
COMMAND = ['net.py', 'run/epoch_2.pth', '--out-dir', 'weights']


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with data and what a run leaves, as working directory; what its checkpoint holds."""
    write_class_folders(tmp_path / 'data/digits', dict(train=1, test=1))
    (tmp_path / 'net.py').write_text(CONFIG)
    for part, records in dict(
        a=[dict(lr=0.1, loss=2.0, step=45), {'accuracy/top1': 10.0, 'time': 1.0, 'step': 1}],
        b=[{'accuracy/top1': 12.34567, 'val/deq_nfe': 2.0, 'step': 2}],
    ).items():
        log = tmp_path / 'run' / part / 'vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text('\n'.join(map(json.dumps, records)))
    monkeypatch.chdir(tmp_path)
    # The tool forces safe loading by it; restored for the tests that come after.
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    content = dict(
        state_dict=build_model(Config.fromfile('net.py')).state_dict(),
        meta=dict(META, time='now'),
        optimizer=dict(state={}),
    )
    torch.save(content, 'run/epoch_2.pth')
    return content


def test_weights_log_and_metrics_are_kept_and_nothing_else(run):
    path = publish.main(COMMAND)
    assert path == Path('weights/net.pth')
    found = torch.load(path, weights_only=True)
    assert found.keys() == {'state_dict', 'meta'}
    for name, value in found['state_dict'].items():
        assert_same(run['state_dict'][name], value, name)
    meta = found['meta']
    assert 0 <= meta.pop('metrics')['accuracy/top1'] <= 100
    log = [{'step': 1, 'accuracy/top1': 10.0}, {'step': 2, 'accuracy/top1': 12.3457}]
    assert meta == dict(META, mdeq_mm_version=mdeq_mm.__version__, log=log)


def test_weights_become_float32_and_counters_stay():
    state = dict(weight=torch.ones(2, dtype=torch.float16), count=torch.tensor(3))
    reduced = publish.reduce(dict(state_dict=state, meta=META), 'a.pth')['state_dict']
    assert {k: v.dtype for k, v in reduced.items()} == dict(weight=torch.float32, count=torch.int64)


@pytest.mark.parametrize('fault', ['no origin', 'no log', 'too large', 'another net', 'no data'])
def test_faults_are_named_and_nothing_is_written(run, monkeypatch, fault):
    words = {
        'no origin': 'epoch_2.pth does not say how it was trained .no cfg, seed',
        'no log': 'run has no .*scalars.json',
        'too large': r'epoch_2.pth: its weights take [\d,]+ bytes in float32, more than 1,000',
        'another net': 'epoch_2.pth does not fit this config',
        'no data': 'elsewhere, which does not exist',
    }
    command = list(COMMAND)
    if fault == 'no origin':
        torch.save(dict(run, meta={}), 'run/epoch_2.pth')
    elif fault == 'no log':
        for log in Path('run').glob('*/vis_data/scalars.json'):
            log.unlink()
    elif fault == 'too large':
        monkeypatch.setattr(publish, 'LIMIT', 1000)
    elif fault == 'another net':
        command += ['--cfg-options', 'model.head.num_classes=3']
    else:
        command += ['--cfg-options', 'data_root=elsewhere']
    with pytest.raises(SystemExit, match=words[fault]):
        publish.main(command)
    assert not Path('weights').exists()
