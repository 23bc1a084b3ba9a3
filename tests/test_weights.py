"""The weights that come with the package: small, plain data, and as good as they say."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

import mdeq_mm
from mdeq_mm.apis import build_runner, load_config
from mdeq_mm.model_index import packaged_weights
from tools.analysis_tools import inference
from tools.dataset_converters import digit_scenes, digits
from tools.model_converters import publish

from .checks import assert_same
from .processes import run

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = packaged_weights()

pytest.importorskip('mmpretrain')


@pytest.fixture
def torch_alone():
    """Allow no global in a checkpoint but torch's own."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.add_safe_globals(allowed)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folders of the images that the weights were tested on, by the name of the weights."""
    folder = tmp_path_factory.mktemp('data')
    digits.build(folder / 'digits')
    # All that validate, which do not depend on how many there are to train on.
    digit_scenes.build(folder / 'scenes', num_train=1, num_val=100, size=64)
    return dict(mdeq_tiny_digits=folder / 'digits', mdeq_demo_digit_scenes=folder / 'scenes')


def test_there_are_weights():
    assert set(WEIGHTS) == {'mdeq_tiny_digits', 'mdeq_demo_digit_scenes'}


@pytest.mark.parametrize('name', WEIGHTS)
def test_weights_are_small_and_plain_and_say_where_they_come_from(name, torch_alone):
    assert WEIGHTS[name].stat().st_size <= publish.LIMIT
    content = torch.load(WEIGHTS[name], weights_only=True)
    dtypes = {key: value.dtype for key, value in content['state_dict'].items()}
    assert {k for k, dtype in dtypes.items() if dtype != torch.float32} == {
        key for key in dtypes if key.endswith('num_batches_tracked')
    }
    meta = content['meta']
    assert re.fullmatch(r'\d+\.\d+\.\d+\w*', meta['mdeq_mm_version'])
    trained = Config.fromstring(meta['cfg'], '.py')
    now = Config.fromfile(ROOT / f'configs/{name}.py')
    for part in ('model', 'train_cfg', 'optim_wrapper', 'param_scheduler'):
        assert trained[part] == now[part], f'the config has changed since the training: {part}'
    assert str(ROOT.parent) not in meta['cfg']


@pytest.mark.parametrize('name', WEIGHTS)
def test_the_log_ends_where_the_config_does_and_at_what_was_measured(name):
    meta = torch.load(WEIGHTS[name], weights_only=True)['meta']
    length = Config.fromfile(ROOT / f'configs/{name}.py').train_cfg
    steps = [entry['step'] for entry in meta['log']]
    assert steps == sorted(steps) and steps[-1] == length.get('max_epochs', length.get('max_iters'))
    last = {key: value for key, value in meta['log'][-1].items() if key != 'step'}
    # Validation and test images are the same; one image of hundreds may be on the edge.
    assert meta['metrics'] == pytest.approx(last, abs=0.5)


# Of 360 images every fifth, 72, of all classes, in whose order the files are: one is 1.4 points. Of
# 100 scenes every other.
@pytest.mark.parametrize(
    'name, metric, part, margin',
    [
        ('mdeq_tiny_digits', 'accuracy/top1', range(0, 360, 5), 3),
        ('mdeq_demo_digit_scenes', 'mIoU', range(0, 100, 2), 5),
    ],
)
def test_they_are_as_good_as_they_say(name, metric, part, margin, data, tmp_path):
    cfg = load_config(
        str(ROOT / f'configs/{name}.py'),
        str(tmp_path),
        options=dict(
            data_root=str(data[name]),
            log_level='ERROR',
            load_from=str(WEIGHTS[name]),
            test_dataloader=dict(num_workers=0, persistent_workers=False),
        ),
    )
    cfg.test_dataloader.dataset.indices = [*part]
    stated = torch.load(cfg.load_from, weights_only=True)['meta']['metrics'][metric]
    assert build_runner(cfg).test()[metric] >= stated - margin


def test_the_hub_loads_them_by_name():
    mdeq_mm.register_models()
    from mmpretrain import get_model

    model = get_model('mdeq_tiny_digits', pretrained=True)
    wanted = torch.load(WEIGHTS['mdeq_tiny_digits'], weights_only=True)['state_dict']
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert_same(dict(found), dict(wanted))


@pytest.mark.skipif(not shutil.which('make'), reason='needs make')
def test_make_try_paints_a_right_prediction(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = run(['make', '-n', 'try', f'TRY={tmp_path}']).stdout
    # What the recipe's own programs print is what is read below.
    capsys.readouterr()
    lines = shown.replace('\\\n', ' ').splitlines()
    commands = [shlex.split(line) for line in lines if re.match(r'\S*/python tools/', line)]
    assert len(commands) == 2, shown
    for _, script, *arguments in commands:
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', [script, *arguments])
            runpy.run_path(script, run_name='__main__')
    *_, weights, best, _, _, _, _, path = capsys.readouterr().out.splitlines()
    assert str(WEIGHTS['mdeq_tiny_digits']) in weights
    assert best.split()[1] == '3' and float(best.split()[0]) > 0.9
    assert path == f'{tmp_path}/prediction.png' and cv2.imread(path).std() > 10


def test_a_config_without_weights_wants_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite('image.png', np.zeros((16, 16, 3), np.uint8))
    config = str(ROOT / 'configs/mdeq_tiny_cifar10.py')
    with pytest.raises(SystemExit, match='no checkpoint .*mdeq_tiny_cifar10, only.*tiny_digits'):
        inference.main(['image.png', config])
