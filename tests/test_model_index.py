"""model-index.yml and the metafiles, as mmpretrain's model hub reads them."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import mdeq_mm
from mdeq_mm.model_index import config_root, packaged_weights

from .processes import run_python
from .recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
FILES = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
# Nets of the projects themselves, beside which ours are measured.
OTHERS = ('hrnet', 'resnet18')
MODELS = [m for file in FILES for m in yaml.safe_load((ROOT / file).read_text())['Models']]


def scope_of(config):
    """mmseg, mmpretrain or mmdet, by the runtime the config or what it inherits from names."""
    text = (ROOT / 'configs' / config).read_text()
    if 'runtime_' in text:
        scopes = dict(seg='mmseg', cls='mmpretrain', det='mmdet')
        return scopes[re.search(r'runtime_(seg|cls|det)', text)[1]]
    return scope_of(re.search(r"_base_ = \['\./(\w+\.py)'\]", text)[1])


def test_every_config_but_demos_and_nets_of_others_is_listed_once():
    stems = {p.stem for p in (ROOT / 'configs').glob('*.py')}
    wanted = {stem for stem in stems if 'demo' not in stem and not stem.startswith(OTHERS)}
    wanted |= packaged_weights().keys()
    names = [model['Name'] for model in MODELS]
    assert len(names) == len(set(names)) and set(names) == wanted
    for model in MODELS:
        assert model['Config'] == f'configs/{model["Name"]}.py'


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_task_is_that_of_the_config(model):
    task = dict(
        mmseg='Semantic Segmentation',
        mmpretrain='Image Classification',
        mmdet='Object Detection',
    )
    (result,) = model['Results']
    assert result['Task'] == task[scope_of(f'{model["Name"]}.py')]


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_weights_are_those_of_the_package_and_results_are_theirs(model):
    path = packaged_weights().get(model['Name'])
    if path is None:
        assert model['Weights'] is None
        return
    assert ROOT / model['Weights'] == path
    measured = torch.load(path, weights_only=True)['meta']['metrics']
    names = {'accuracy/top1': 'Top 1 Accuracy', 'mIoU': 'mIoU'}
    wanted = {names[name]: round(value, 1) for name, value in measured.items() if name in names}
    assert model['Results'][0]['Metrics'] == wanted


def _published(pages):
    """name: (parameters, first published number) by the rows of the tables."""
    rows = {}
    for page, parameters, result in pages:
        for line in (ROOT / page).read_text().splitlines():
            cells = [cell.strip() for cell in line.strip('|').split('|')]
            name = re.search(r'`(?:configs/)?(\w+)\.py`', line)
            if line.startswith('|') and name and '$' not in line:
                count = cells[parameters].split('/')[0].strip().replace(',', '')
                if number := re.match(r'[\d.]+', cells[result]):
                    rows[name[1]] = int(count), number[0]
    return rows


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_published_numbers_are_those_of_the_pages(model):
    rows = _published([('docs/models.md', 2, 3), ('docs/baselines.md', 3, 4)])
    published = model.get('Published')
    if published is None:
        assert model['Name'] not in rows
        return
    parameters, number = rows[model['Name']]
    assert model['Metadata']['Parameters'] == parameters
    assert next(iter(published['Metrics'].values())) == float(number)
    assert published['Source']


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_parameters_are_those_of_the_model_that_is_built(model):
    # The recipes' own are compared with what a Runner builds.
    assert model['Metadata']['Parameters'] == RECIPES[model['Name']]['heads']['parameters']


def test_results_are_our_own():
    results = {model['Name']: model['Results'][0]['Metrics'] for model in MODELS}
    measured = {name: metrics for name, metrics in results.items() if metrics}
    readme = (ROOT / 'README.md').read_text()
    assert measured == dict(
        mdeq_tiny_digits={'Top 1 Accuracy': 98.9},
        mdeq_small_camvid={'mIoU': 53.5},
        mdeq_demo_digit_scenes={'mIoU': 66.5},
    )
    assert '98.9% top-1' in readme and '53.5 ± 1.3 mIoU' in readme
    assert '66.5 mIoU' in (ROOT / 'docs/weights_and_transfer.md').read_text()


@pytest.fixture
def hub():
    pytest.importorskip('mmpretrain')
    mdeq_mm.register_models()
    mdeq_mm.register_models()
    import mmpretrain

    return mmpretrain


def test_models_are_listed(hub):
    names = hub.list_models('*mdeq*', task='Image Classification')
    assert 'mdeq_small_imagenet' in names and len(names) == 14
    # Segmentors are not mmpretrain's to build.
    assert not [name for name in hub.list_models('*mdeq*') if 'cityscapes' in name]


def test_a_model_is_built_by_name_with_changes(hub):
    model = hub.get_model('mdeq_tiny_cifar10', backbone=dict(solver=dict(max_iter=2)))
    assert sum(p.numel() for p in model.parameters()) == 158986
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 8, 8), mode='tensor').shape == (1, 10)


def test_registering_needs_mmpretrain(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmpretrain.apis', None)
    monkeypatch.setitem(sys.modules, 'mmpretrain', None)
    with pytest.raises(ModuleNotFoundError, match='mmpretrain'):
        mdeq_mm.register_models()


def test_a_wheel_reads_its_own_copy(tmp_path, monkeypatch):
    package = tmp_path / 'mdeq_mm'
    monkeypatch.setattr('mdeq_mm.model_index.__file__', str(package / 'model_index.py'))
    with pytest.raises(FileNotFoundError, match='metafile'):
        config_root()
    (package / '.mim/configs').mkdir(parents=True)
    (package / '.mim/configs/metafile.yml').touch()
    assert config_root() == package / '.mim'


def test_a_built_package_serves_models_from_a_foreign_folder(tmp_path):
    pytest.importorskip('mmpretrain')
    build = ['build', '--build-base', str(tmp_path), '--build-lib', str(tmp_path / 'lib')]
    command = ['setup.py', '-q', 'egg_info', '--egg-base', str(tmp_path), *build]
    run_python(*command, cwd=ROOT)
    mim = tmp_path / 'lib/mdeq_mm/.mim'
    assert [n for n in ('model-index.yml', *FILES) if not (mim / n).is_file()] == []
    code = (
        'import mdeq_mm; mdeq_mm.register_models()\n'
        'from mmpretrain import get_model\n'
        "model = get_model('mdeq_tiny_digits', pretrained=True)\n"
        'print(model._config.filename, model._metainfo.weights)'
    )
    done = run_python('-c', code, cwd=tmp_path, env={'PYTHONPATH': str(tmp_path / 'lib')})
    weights = tmp_path / 'lib/mdeq_mm/weights/mdeq_tiny_digits.pth'
    assert done.stdout.splitlines()[-1] == f'{mim / "configs/mdeq_tiny_digits.py"} {weights}'
