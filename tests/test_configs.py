"""What the Runner of every config holds is what ``recipes.py`` says, value by value."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

from mdeq_mm.apis import check_scales

from .built_configs import measure, measure_core, plain
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
