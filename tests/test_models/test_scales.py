"""Whether neck and heads take the scales of the backbone, in a config and in a built model."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mdeq_mm.apis import check_scales

from ..checks import assert_says

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


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
            {'model.backbone.channels': None, 'model.backbone.arch': 'large'},
            ['model.decode_head', '4 scales of [80, 160, 320, 640]', 'arch'],
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
def test_scales_that_disagree_are_named_before_anything_is_built(name, options, words):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.merge_from_dict(options)
    init_default_scope(cfg.default_scope)

    def build(model):
        with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
            MODELS.build(model)

    # Our tools look at the config, MM's own build the model.
    for check in (check_scales, build):
        with pytest.raises(ValueError) as error:
            check(cfg.model)
        assert_says(error, words)


def test_several_scales_without_an_index_are_all_of_them_and_second_necks_are_not_asked():
    backbone = dict(type='MDEQBackbone', arch='small')
    # As mask heads have it.
    check_scales(dict(backbone=backbone, decode_head=dict(in_channels=[32, 64, 128, 256])))
    with pytest.raises(ValueError, match='model.decode_head takes in_channels=64'):
        check_scales(dict(backbone=backbone, decode_head=dict(in_channels=64)))
    necks = [dict(type='FPN', in_channels=[32, 64, 128, 256]), dict(type='JPU', in_channels=[8])]
    check_scales(dict(backbone=backbone, neck=necks))
    with pytest.raises(ValueError, match='model.neck.in_channels'):
        check_scales(dict(backbone=backbone, neck=necks[::-1]))


def test_a_head_behind_a_neck_takes_what_the_neck_gives():
    pytest.importorskip('mmseg.models')
    backbone = dict(type='MDEQBackbone', arch='small')
    neck = dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=48, num_outs=4)
    head = dict(type='FCNHead', in_channels=48, in_index=3, channels=8, num_classes=2, num_convs=1)
    model = dict(type='EncoderDecoder', backbone=backbone, neck=neck, decode_head=head)
    check_scales(model)
    init_default_scope('mmseg')
    with DefaultScope.overwrite_default_scope('mmseg'), torch.device('meta'):
        MODELS.build(model)
        # Without one, the same head is refused.
        del model['neck']
        with pytest.raises(ValueError, match='model.decode_head takes in_channels=48'):
            MODELS.build(model)


def _head(kind, in_channels, in_index, **options):
    head = dict(type=kind, in_channels=in_channels, in_index=in_index, channels=8, num_classes=3)
    return dict(head, **options)


def _ocr_head(in_channels):
    """As the second of a cascade, it sees the features and the prediction of the first."""
    options = dict(input_transform='resize_concat', ocr_channels=4)
    return _head('OCRHead', in_channels, (0, 1), **options)


@pytest.mark.parametrize(
    'model, words',
    [
        (dict(auxiliary_head=[_head('FCNHead', 16, 1)]), None),
        (dict(auxiliary_head=[_head('FCNHead', 64, 1)]), 'auxiliary_head.0 takes in_channels=64'),
        (
            dict(auxiliary_head=[_head('FCNHead', 8, 0), _head('FCNHead', 16, 2)]),
            r'auxiliary_head.1 takes in_channels=16 at in_index=\[2\]',
        ),
        (dict(decode_head=[_head('FCNHead', 8, 0), _ocr_head((8, 16))]), None),
        (
            dict(decode_head=[_head('FCNHead', 8, 0), _ocr_head((8, 64))]),
            r'decode_head.1 takes in_channels=.* at in_index=\[0, 1\]',
        ),
        (dict(decode_head=[_head('FCNHead', 4, 0), _ocr_head((8, 16))]), 'decode_head.0'),
        (dict(decode_head=[_head('FCNHead', 4, 0)]), 'decode_head.0'),
    ],
)
def test_heads_in_a_list_are_compared_each(model, words):
    pytest.importorskip('mmseg')
    backbone = dict(type='MDEQBackbone', channels=(8, 16))
    kind, stages = 'EncoderDecoder', {}
    if 'decode_head' in model:
        kind, stages = 'CascadeEncoderDecoder', dict(num_stages=len(model['decode_head']))
    heads = dict(decode_head=_head('FCNHead', 16, 1))
    model = dict(type=kind, backbone=backbone, **stages, **{**heads, **model})
    init_default_scope('mmseg')

    def build(model):
        with DefaultScope.overwrite_default_scope('mmseg'), torch.device('meta'):
            MODELS.build(model)

    for check in (check_scales, build):
        with pytest.raises(ValueError, match=words) if words else nullcontext():
            check(model)


def test_heads_that_come_to_a_model_in_a_filled_list_are_compared():
    pytest.importorskip('mmseg.models')
    init_default_scope('mmseg')

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = MODELS.build(dict(type='MDEQBackbone', channels=(8, 16)))

    def head(width):
        with DefaultScope.overwrite_default_scope('mmseg'):
            return MODELS.build(_head('FCNHead', width, 1))

    model = Model()
    with pytest.raises(ValueError, match='auxiliary_head.1 takes in_channels=8'):
        model.auxiliary_head = nn.ModuleList([head(16), head(8)])
    model.auxiliary_head = nn.ModuleList([head(16)])
    with pytest.raises(ValueError, match='auxiliary_head.1 takes in_channels=8'):
        model.auxiliary_head.append(head(8))
