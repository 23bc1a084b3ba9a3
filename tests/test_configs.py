"""Every config builds; those of the paper have its hyperparameters and parameter counts."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import mdeq_mm  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))

# name: (backbone, whole official network) parameters, from the released networks. FCNHead has no
# bias before its batch norm, so segmentation models lack that one, as wide as all scales together.
OFFICIAL = {
    'mdeq_tiny_cifar10': (117720, 158986),
    'mdeq_large_cifar10': (8727488, 11098398),
    'mdeq_small_imagenet': (8727488, 16808936),
    'mdeq_large_imagenet': (54489440, 67063624),
    'mdeq_xl_imagenet': (77780296, 90463280),
    'mdeq_small_cityscapes': (8727488, 8968467),
    'mdeq_large_cityscapes': (54489440, 55955859),
    'mdeq_xl_cityscapes': (77780296, 79551755),
}

# name: forward and backward max_iter, drop rate, unrolled layers, iterations of warm-up,
# optimizer and learning rate, weight decay, batch a GPU, batch in all, epochs.
TABLE = {
    'mdeq_tiny_cifar10': (22, 24, 0.25, 10, 3000, 'Adam', 1e-3, 2.5e-6, 64, 128, 50),
    'mdeq_large_cifar10': (18, 20, 0.3, 10, 20000, 'Adam', 1e-3, 0, 32, 128, 220),
    'mdeq_small_imagenet': (26, 27, 0, 5, 500000, 'SGD', 0.05, 5e-5, 32, 128, 100),
    'mdeq_large_imagenet': (24, 24, 0, 4, 550000, 'SGD', 0.05, 1e-4, 28, 112, 100),
    'mdeq_xl_imagenet': (27, 27, 0, 4, 400000, 'SGD', 0.05, 7e-5, 24, 192, 100),
    'mdeq_small_cityscapes': (27, 30, 0.05, 3, 60000, 'SGD', 0.01, 2e-4, 3, 12, 500),
    'mdeq_large_cityscapes': (26, 26, 0.03, 3, 32000, 'SGD', 0.01, 3e-4, 3, 12, 500),
    'mdeq_xl_cityscapes': (26, 26, 0.04, 3, 40000, 'SGD', 0.01, 3e-4, 2, 16, 500),
}

# Processes that a config's learning rate is for; one where it is not listed.
GPUS = dict(
    mdeq_tiny_cifar10=2,
    deq_tiny_cifar10=2,
    node_cifar10=2,
    anode_cifar10=2,
    mdeq_large_cifar10=4,
    mdeq_small_imagenet=4,
    deq_small_imagenet=4,
    mdeq_large_imagenet=4,
    mdeq_unrolled5_large_imagenet=4,
    mdeq_xl_imagenet=8,
    mdeq_small_cityscapes=4,
    mdeq_large_cityscapes=4,
    mdeq_xl_cityscapes=8,
    mdeq_small_fpn_coco=8,
)


def load(name):
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


def build(cfg):
    scope = cfg.default_scope
    pytest.importorskip(dict(mmseg='mmseg', mmpretrain='mmpretrain')[scope])
    init_default_scope(scope)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg.model)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('name', CONFIGS)
def test_config_is_complete(name):
    cfg = load(name)
    assert cfg.custom_imports == dict(imports=['mdeq_mm'], allow_failed_imports=False)
    assert cfg.default_scope in ('mmseg', 'mmpretrain', 'mmdet')
    for part in ('train', 'val', 'test'):
        assert cfg[f'{part}_dataloader'].dataset.data_root
    assert cfg.val_evaluator and cfg.test_evaluator
    if cfg.default_scope == 'mmseg':
        assert cfg.model.data_preprocessor.type == 'SegDataPreProcessor'
    elif cfg.default_scope == 'mmdet':
        assert cfg.model.data_preprocessor.type == 'DetDataPreprocessor'
    else:
        assert cfg.data_preprocessor.mean


@pytest.mark.parametrize('name', OFFICIAL)
def test_parameter_counts_are_the_official_ones_to_the_unit(name):
    cfg = load(name)
    with torch.device('meta'):
        model = build(cfg)
    backbone, whole = OFFICIAL[name]
    folded = sum(cfg.model.backbone.channels) if cfg.default_scope == 'mmseg' else 0
    assert parameters(model.backbone) == backbone
    assert parameters(model) == whole - folded


@pytest.mark.parametrize('name', TABLE)
def test_hyperparameters_are_those_of_the_released_networks(name):
    cfg = load(name)
    backbone, optimizer = cfg.model.backbone, cfg.optim_wrapper.optimizer
    warmup = cfg.default_hooks.warmup
    batch = cfg.auto_scale_lr.base_batch_size
    if 'max_epochs' in cfg.train_cfg:
        epochs = cfg.train_cfg.max_epochs
    else:
        epochs = round(cfg.train_cfg.max_iters * batch / 2975)
    assert TABLE[name] == (
        backbone.solver.max_iter,
        backbone.gradient.solver.max_iter,
        backbone.get('drop_rate', 0),
        warmup.unrolled_layers,
        warmup.unrolled_iters,
        optimizer.type,
        optimizer.lr,
        optimizer.weight_decay,
        cfg.train_dataloader.batch_size,
        batch,
        epochs,
    )
    assert optimizer.get('nesterov', False) == ('imagenet' in name)
    assert backbone.solver.type == backbone.gradient.solver.type == 'LimitedMemoryBroyden'
    assert cfg.param_scheduler[-1].type == 'CosineAnnealingLR'


@pytest.mark.parametrize('name', CONFIGS)
def test_schedule_ends_with_the_training(name):
    cfg = load(name)
    last = cfg.param_scheduler[-1]
    length = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    assert last.end == length
    assert last.get('T_max', length) in (length, length - last.begin)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_learning_rate_is_scaled_from_the_batch_it_is_for(name):
    cfg = load(name)
    batch = cfg.train_dataloader.batch_size * GPUS.get(name, 1)
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=batch)


def test_poly_schedule_replaces_the_cosine():
    cfg = Config.fromfile(ROOT / 'configs/_base_/schedules/cityscapes_poly.py')
    assert [s.type for s in cfg.param_scheduler] == ['PolyLR']
    assert cfg.param_scheduler[0].power == 0.9


def test_knobs_are_reached_from_the_command_line():
    cfg = load('mdeq_large_cityscapes')
    cfg.merge_from_dict(
        {'model.backbone.solver.max_iter': 3, 'model.backbone.gradient.solver.type': 'Anderson'}
    )
    with torch.device('meta'):
        backbone = build(cfg).backbone
    assert backbone.implicit.solver.max_iter == 3
    assert type(backbone.implicit.gradient.solver).__name__ == 'Anderson'


@pytest.mark.parametrize('name', CONFIGS)
def test_neck_and_heads_fit_the_scales_of_the_backbone(name, load_tool):
    load_tool('_common').check_scales(load(name).model)


@pytest.mark.parametrize(
    'name, options, words',
    [
        (
            'mdeq_small_cityscapes',
            {'model.backbone.channels': (32, 64, 128)},
            ['model.decode_head', '3 scales of [32, 64, 128]', 'in_index=[0, 1, 2, 3]'],
        ),
        (
            'mdeq_small_cityscapes',
            {'model.backbone.out_indices': (0, 1)},
            ['model.decode_head', '2 scales of [32, 64]'],
        ),
        (
            'mdeq_tiny_cifar10',
            {'model.backbone.channels': (24, 24, 24)},
            ['model.neck.in_channels is [24, 24]', '[24, 24, 24]'],
        ),
    ],
)
def test_scales_that_disagree_are_named_before_anything_is_built(name, options, words, load_tool):
    cfg = load(name)
    cfg.merge_from_dict(options)
    with pytest.raises(ValueError) as error:
        load_tool('_common').check_scales(cfg.model)
    assert all(word in str(error.value) for word in words), error.value
