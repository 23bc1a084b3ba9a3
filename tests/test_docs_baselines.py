"""docs/baselines.md: its configs exist, its commands run, its counts are what they build."""

import argparse
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope, init_default_scope
from torch.overrides import TorchFunctionMode

import mdeq_mm  # noqa: F401
from tools import train

from .mini_datasets import write_cityscapes
from .processes import run

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs/baselines.md').read_text()
PACKAGES = dict(MMPRETRAIN='mmpretrain', MMSEG='mmseg')
ROWS = [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in PAGE.splitlines()
    if re.match(r'\| .* \| [123] \|', line)
]
BLOCKS = re.findall(r'```bash\n(.*?)```', PAGE, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in BLOCKS
    for line in block.replace('\\\n', ' ').splitlines()
    if line.startswith('python tools/train.py')
]


def resolve(name):
    """The file a name of the page stands for."""
    match = re.match(r'\$(\w+)/(.+)', name)
    if match is None:
        return ROOT / name
    package = pytest.importorskip(PACKAGES[match[1]])
    return Path(package.__path__[0]) / '.mim/configs' / match[2]


def named(row):
    return re.findall(r'`([^`]+\.py)`', row[-1])


def options_of(name):
    """The options that the page gives a config of its table; none for most."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    for _, _, config, *rest in COMMANDS:
        if config == name and rest:
            return parser.parse_args(rest).cfg_options
    return {}


class _NoStorage(TorchFunctionMode):
    """Parameters on the meta device. Unlike with that as the default, tensors keep values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **(dict(kwargs, device='meta') if func is torch.empty else kwargs))


def count(path, options, scope):
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options)
    init_default_scope(scope)
    with DefaultScope.overwrite_default_scope(scope), _NoStorage():
        model = MODELS.build(cfg.model)
    return sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith('auxiliary_head.')
    )


def test_the_page_has_every_baseline_of_the_paper():
    assert [sum(row[1] == table for row in ROWS) for table in '123'] == [5, 11, 11]
    assert all(len(row) == 6 for row in ROWS)
    assert sum(bool(named(row)) for row in ROWS) == 24


@pytest.mark.parametrize('name', sorted({n for row in ROWS for n in named(row)}))
def test_every_named_config_exists(name):
    assert resolve(name).is_file()


@pytest.mark.parametrize('row', [r for r in ROWS if r[3] != '–'], ids=lambda row: row[0])
def test_parameters_are_those_of_the_page(row):
    (name,) = named(row)
    if 'node' in name:
        pytest.importorskip('torchdiffeq')
    path = resolve(name)
    scope = 'mmseg' if name.startswith('$MMSEG') else 'mmpretrain'
    pytest.importorskip(scope)
    options = options_of(name) if 'options below' in row[-1] else {}
    assert f'{count(path, options, scope):,}' == row[3]


def test_nothing_augments_where_the_page_says_so():
    pytest.importorskip('mmpretrain')
    name = '$MMPRETRAIN/resnet/resnet18_8xb16_cifar10.py'
    cfg = Config.fromfile(resolve(name))
    cfg.merge_from_dict(options_of(name))
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert [step.type for step in pipeline] == ['RandomCrop', 'RandomFlip', 'PackInputs']
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        importlib.import_module('mmpretrain.datasets')
        for step in pipeline[:2]:
            transform = TRANSFORMS.build(step)
            for _ in range(8):
                assert np.array_equal(transform(dict(img=image))['img'], image)


def test_a_command_of_the_page_trains(tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    pytest.importorskip('mmpretrain')
    *setting, classifier, segmentor = BLOCKS[0].strip().splitlines()
    assert classifier.startswith('python tools/train.py $MMPRETRAIN/')
    # The shell expands the commands; the second one runs in this process.
    script = '\n'.join(['set -e', *setting, f'echo {classifier}', f'echo {segmentor}'])
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    out = run(['bash', '-c', script], env={'PATH': path}).stdout
    configs = [line.split()[2] for line in out.splitlines()]
    assert len(configs) == 2
    for config in configs:
        assert Path(config).is_file(), config

    data = write_cityscapes(tmp_path / 'cityscapes')
    options = [
        'model.pretrained=None',
        'crop_size=(32,64)',
        'train_dataloader.dataset.pipeline.2.scale=(128,64)',
        'train_dataloader.num_workers=0',
        'train_cfg.max_iters=1',
        f'data_root={data}',
    ]
    flags = ['--no-validate', '--work-dir', str(tmp_path), '--cfg-options', *options]
    runner = train.main([configs[1], *flags])
    assert runner.iter == 1 and (tmp_path / 'iter_1.pth').is_file()
