"""Recipes published since the paper train: two iterations of each, on four images."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import mdeq_mm  # noqa: F401

from .checks import assert_finite
from .mini_datasets import write_class_folders

ROOT = Path(__file__).resolve().parents[1]

# Most evaluations of f in a forward pass.
MOST_CALLS = dict(
    mdeq_large_cifar10_jac=9,
    mdeq_small_imagenet_jac=15,
    mdeq_large_imagenet_jac=15,
    mdeq_tiny_cifar10_phantom=22,
    mdeq_large_cifar10_phantom=18,
    mdeq_small_imagenet_phantom=26,
)


@pytest.fixture
def config(tmp_path):
    """Give a function that reads a config and sets it on four images, one epoch, two steps."""
    root = write_class_folders(tmp_path / 'data', dict(train=2), num_classes=2, size=32)

    def read(name):
        cfg = Config.fromfile(ROOT / f'configs/{name}.py')
        steps = [
            dict(step, scale=32) if step.type == 'RandomResizedCrop' else step
            for step in cfg.train_dataloader.dataset.pipeline
            if step.type != 'LoadImageFromFile'
        ]
        cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
        cfg.train_dataloader.dataset = dict(
            type='CustomDataset',
            data_root=str(root),
            data_prefix='train',
            pipeline=[dict(type='LoadImageFromFile'), *steps],
        )
        cfg.train_cfg.max_epochs = 1
        for split in ('val', 'test'):
            cfg[f'{split}_dataloader'] = cfg[f'{split}_cfg'] = cfg[f'{split}_evaluator'] = None
        cfg.default_hooks.checkpoint.update(interval=100, save_last=False, save_best=None)
        cfg.default_hooks.solver_stats.interval = cfg.default_hooks.logger.interval = 1
        if 'large_imagenet' in name:
            # A fifth of the widths: at 67 million parameters the optimizer's step takes longest.
            channels = [width // 5 for width in cfg.model.backbone.channels]
            cfg.model.backbone.channels = cfg.model.neck[0].in_channels = channels
        # The equilibrium at once, and a penalty in every iteration.
        cfg.default_hooks.warmup.unrolled_iters = 0
        if 'regularizer' in cfg.model.backbone:
            cfg.model.backbone.regularizer.probability = 1.0
        cfg.randomness = dict(seed=0)
        cfg.work_dir = str(tmp_path / 'work')
        return cfg

    return read


@pytest.mark.parametrize('name', MOST_CALLS)
def test_two_iterations_of_a_recipe(name, config):
    pytest.importorskip('mmpretrain')
    runner = Runner.from_cfg(config(name))
    runner.model.init_weights()
    cell = runner.model.backbone.cell
    before = {name: p.detach().clone() for name, p in cell.named_parameters()}
    runner.train()
    assert runner.iter == 2
    scalars = runner.message_hub.log_scalars
    losses, _ = scalars['train/loss'].data
    assert len(losses) == 2
    assert_finite(torch.tensor(losses))
    calls, _ = scalars['train/train/deq_nfe'].data
    assert len(calls) == 2 and max(calls) <= MOST_CALLS[name]
    if name.endswith('jac'):
        penalties, _ = scalars['train/loss_jacobian'].data
        assert len(penalties) == 2 and min(penalties) > 0
    else:
        assert 'train/loss_jacobian' not in scalars
    after = runner.model.backbone.cell.named_parameters()
    assert [name for name, value in after if torch.equal(value, before[name])] == []
