"""The two nets of the CamVid study: of one size, trained alike, on what the converter writes."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import mdeq_mm  # noqa: F401
from tools import train
from tools.dataset_converters import camvid

ROOT = Path(__file__).resolve().parents[2]
NAMES = ('mdeq_small_camvid', 'hrnet_camvid')


@pytest.fixture
def configs():
    return [Config.fromfile(ROOT / 'configs' / f'{name}.py') for name in NAMES]


def parameters(cfg):
    pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    with DefaultScope.overwrite_default_scope('mmseg'), torch.device('meta'):
        return sum(p.numel() for p in MODELS.build(cfg.model).parameters())


def test_both_nets_have_as_many_parameters_as_the_page_says(configs):
    page = (ROOT / 'docs/baselines.md').read_text()
    stated = re.search(r'Parameters: ([\d,]+) \(MDEQ\) and ([\d,]+) \(HRNet\)', page).groups()
    counts = [parameters(cfg) for cfg in configs]
    assert counts == [int(number.replace(',', '')) for number in stated]
    assert abs(counts[1] / counts[0] - 1) < 0.05


def test_both_nets_are_trained_and_judged_alike(configs):
    mdeq, hrnet = configs
    for cfg in configs:
        # Each has its own learning rate.
        cfg.optim_wrapper.optimizer.pop('lr')
        for key in ('in_channels', 'in_index', 'channels', 'norm_cfg'):
            cfg.model.decode_head.pop(key)
        cfg.model.pop('backbone')
    assert hrnet.default_hooks.get('warmup') is None
    mdeq.default_hooks.pop('warmup')
    own = {'channels', 'norm_cfg', 'basic'}
    assert set(mdeq.keys()) - own == set(hrnet.keys()) - own
    for key in set(mdeq.keys()) - own:
        assert mdeq[key] == hrnet[key], key


def test_class_weights_are_one_on_average_over_the_pixels(configs):
    # Shares of the classes among the labelled pixels of the 120 training images, in percent.
    percent = [17.5, 23.9, 1.0, 33.3, 4.6, 10.2, 1.2, 1.2, 6.1, 0.7, 0.3]
    share = np.array(percent) / sum(percent)
    weight = np.array(configs[0].model.decode_head.loss_decode.class_weight)
    assert abs((share * weight).sum() - 1) < 0.02
    np.testing.assert_allclose(weight * np.sqrt(share), (weight * np.sqrt(share)).mean(), rtol=0.05)


def write_download(root):
    """Write stripes of CamVid's classes in the form of the SegNet tutorial."""
    labels = np.repeat((np.arange(48)[:, None] // 4).astype(np.uint8), 64, axis=1)
    for split, count in (('train', 8), ('val', 2)):
        for folder in (split, f'{split}annot'):
            (root / folder).mkdir(parents=True)
        for index in range(count):
            target = np.roll(labels, 5 * index, axis=0)
            image = np.repeat(target[..., None] * 20, 3, axis=2)
            cv2.imwrite(str(root / split / f'{index}.png'), image)
            cv2.imwrite(str(root / f'{split}annot' / f'{index}.png'), target)
    return root


@pytest.mark.parametrize('name', NAMES)
def test_trains_on_what_the_converter_writes(name, tmp_path):
    pytest.importorskip('mmseg')
    camvid.build(write_download(tmp_path / 'download'), tmp_path / 'data', size=(32, 24))
    options = [
        f'data_root={tmp_path / "data"}',
        'crop_size=(24,32)',
        'train_dataloader.dataset.pipeline.2.scale=(32,24)',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
    ]
    flags = ['--work-dir', str(tmp_path / 'work'), '--cfg-options', *options]
    runner = train.main([str(ROOT / f'configs/{name}.py'), *flags])
    assert runner.iter == 2
    assert 0 <= runner.message_hub.get_scalar('val/mIoU').current() <= 100
    # Void is left out: the other eleven classes are what is scored.
    assert len(runner.val_evaluator.dataset_meta['classes']) == 11
