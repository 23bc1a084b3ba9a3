"""What the Runner of every config holds is what ``recipes.py`` says, value by value."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mdeq_mm.apis import check_scales

from .built_configs import measure, measure_core, plain
from .checks import assert_says
from .recipes import DETECTOR, RECIPES

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
SECTIONS = ('backbone', 'heads', 'training', 'data', 'evaluation', 'runtime')
NEEDS = dict(mmdet=['mmdet', 'mmcv._ext'], mmpretrain=['mmpretrain'], mmseg=['mmseg'], mmengine=[])


def load(name):
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


def differences(got: Any, wanted: Any, place: str = '') -> Iterator[str]:
    """A line for every value that is not as wanted: where it is, what it is, what it should be."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        for key in {**wanted, **got}:
            if key not in got or key not in wanted:
                state = 'is missing' if key in wanted else 'is not in the recipe'
                yield f'{place}{key}: {state}: {wanted.get(key, got.get(key))!r}'
            else:
                yield from differences(got[key], wanted[key], f'{place}{key}: ')
    elif isinstance(got, list) and isinstance(wanted, list) and _names(got) == _names(wanted):
        for item, other, name in zip(got, wanted, _names(got)):
            yield from differences(item, other, f'{place}{name}')
    elif isinstance(got, float) and isinstance(wanted, (int, float)):
        if not math.isclose(got, wanted, rel_tol=1e-4):
            yield f'{place}got {got!r}, wanted {wanted!r}'
    elif got != wanted or type(got) is not type(wanted):
        yield f'{place}got {_short(got)!r}, wanted {_short(wanted)!r}'


def _names(items: list) -> list[str]:
    return [f'{_short([item])[0]}: ' if isinstance(item, dict) else '' for item in items]


def _short(value: Any) -> Any:
    """The types alone of a list of parts."""
    if isinstance(value, list):
        return [item.get('type', item) if isinstance(item, dict) else item for item in value]
    return value


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Give a function that measures a config, once for all tests."""
    known = {}

    def of(name):
        cfg = load(name)
        for module in NEEDS[cfg.default_scope]:
            pytest.importorskip(module)
        if cfg.model.get('backbone', {}).get('type') == 'NeuralODEBackbone':
            pytest.importorskip('torchdiffeq')
        if name not in known:
            known[name] = measure(cfg, tmp_path_factory.mktemp(name))
        return known[name]

    return of


def test_every_config_has_a_recipe():
    assert sorted(RECIPES) == CONFIGS


@pytest.mark.parametrize('section', SECTIONS)
@pytest.mark.parametrize('name', CONFIGS)
def test_the_runner_of_a_config_holds_its_recipe(name, section, built):
    lines = list(differences(built(name)[section], RECIPES[name][section]))
    assert not lines, '\n'.join([f'configs/{name}.py, {section}:', *lines])


def test_a_detector_holds_its_recipe_where_mmdetection_is_not(tmp_path):
    got = measure_core(load('mdeq_small_fpn_coco'), tmp_path)
    recipe = RECIPES['mdeq_small_fpn_coco']
    hooks = [h for h in recipe['runtime']['hooks'] if h['type'] != 'DetVisualizationHook']
    wanted = dict(backbone=recipe['backbone'], training=recipe['training'], hooks=hooks)
    assert not list(differences(got, wanted))


def test_a_detector_says_its_recipe():
    """Its head, data and evaluation, which nothing builds where mmdetection is not."""
    cfg = load('mdeq_small_fpn_coco')
    cfg.model.pop('backbone')
    got = {name: plain(cfg[name]) for name in DETECTOR}
    lines = list(differences(got, DETECTOR))
    assert not lines, '\n'.join(lines)


def test_a_difference_is_told_by_name():
    wanted = dict(lr=0.1, steps=[dict(type='Crop', size=[2, 3]), dict(type='Flip', prob=0.5)])
    assert not list(differences(wanted, wanted))
    got = dict(lr=0.2, steps=[dict(type='Crop', size=[3, 2]), dict(type='Flip', prob=0.5)])
    assert list(differences(got, wanted)) == [
        'lr: got 0.2, wanted 0.1',
        'steps: Crop: size: got 3, wanted 2',
        'steps: Crop: size: got 2, wanted 3',
    ]
    got = dict(steps=[dict(type='Flip', prob=0.5)], rate=None)
    assert list(differences(got, wanted)) == [
        'lr: is missing: 0.1',
        "steps: got ['Flip'], wanted ['Crop', 'Flip']",
        'rate: is not in the recipe: None',
    ]


def test_poly_schedule_replaces_the_cosine(tmp_path):
    pytest.importorskip('mmseg')
    text = (ROOT / 'configs/mdeq_small_cityscapes.py').read_text()
    text = text.replace('cityscapes_cosine', 'cityscapes_poly')
    text = text.replace('./_base_', str(ROOT / 'configs/_base_'))
    (tmp_path / 'poly.py').write_text(text)
    got = measure(Config.fromfile(tmp_path / 'poly.py'), tmp_path)['training']
    poly = dict(
        type='PolyLR', begin=0, end=124_000, power=0.9, eta_min=0, by_epoch=False, param_name='lr'
    )
    wanted = dict(RECIPES['mdeq_small_cityscapes']['training'], schedule=[poly])
    assert not list(differences(got, wanted))


def test_knobs_are_reached_from_the_command_line():
    pytest.importorskip('mmseg')
    cfg = load('mdeq_large_cityscapes')
    cfg.merge_from_dict(
        {'model.backbone.solver.max_iter': 3, 'model.backbone.gradient.solver.type': 'Anderson'}
    )
    init_default_scope('mmseg')
    with DefaultScope.overwrite_default_scope('mmseg'), torch.device('meta'):
        backbone = MODELS.build(cfg.model).backbone
    assert backbone.implicit.solver.max_iter == 3
    assert type(backbone.implicit.gradient.solver).__name__ == 'Anderson'


@pytest.mark.parametrize('name', CONFIGS)
def test_neck_and_heads_fit_the_scales_of_the_backbone(name):
    check_scales(load(name).model)


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
    cfg = load(name)
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
    pytest.importorskip('mmseg')

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = MODELS.build(dict(type='MDEQBackbone', channels=(8, 16)))

    def head(width):
        return MODELS.build(dict(_head('FCNHead', width, 1), type='mmseg.FCNHead'))

    model = Model()
    with pytest.raises(ValueError, match='auxiliary_head.1 takes in_channels=8'):
        model.auxiliary_head = nn.ModuleList([head(16), head(8)])
    model.auxiliary_head = nn.ModuleList([head(16)])
    with pytest.raises(ValueError, match='auxiliary_head.1 takes in_channels=8'):
        model.auxiliary_head.append(head(8))
