"""What is changed in mmengine and mmseg: look-ups of configs, class weights."""

import pytest
import torch
from mmengine.config import Config
from mmengine.config import utils as config_utils

from mdeq_mm import compat

INHERITING = """
_base_ = ['mmseg::_base_/datasets/cityscapes.py', 'mmpretrain::_base_/default_runtime.py']
"""


def test_configs_inherit_from_other_projects(python_without, tmp_path):
    for project in ('mmseg', 'mmpretrain'):
        pytest.importorskip(project)
    (tmp_path / 'mine.py').write_text(INHERITING)
    code = (
        'import mdeq_mm\nfrom mmengine.config import Config\n'
        "cfg = Config.fromfile('mine.py')\n"
        'print(cfg.dataset_type, cfg.default_scope)'
    )
    # Newer setuptools has no pkg_resources, which upstream's mmengine imports.
    done = python_without('pkg_resources', '-c', code)
    assert done.stdout.split() == ['CityscapesDataset', 'mmpretrain'], done.stderr


def test_a_project_that_is_not_there_is_named(tmp_path):
    (tmp_path / 'mine.py').write_text("_base_ = ['mmrotate::_base_/default_runtime.py']\n")
    with pytest.raises(ModuleNotFoundError, match='mmrotate is not installed'):
        Config.fromfile(tmp_path / 'mine.py')


def test_an_editable_install_is_found_where_its_files_are(tmp_path, monkeypatch):
    # Its record lies in site-packages, its files in a checkout that an import hook names.
    package = tmp_path / 'checkout' / 'mmaction'
    (package / '.mim/configs/_base_').mkdir(parents=True)
    (package / '__init__.py').touch()
    (package / '.mim/model-index.yml').write_text('Import: []\n')
    (package / '.mim/configs/_base_/own.py').write_text('answer = 42\n')
    record = tmp_path / 'site' / 'mmaction-1.0.dist-info'
    record.mkdir(parents=True)
    (record / 'METADATA').write_text('Metadata-Version: 2.1\nName: mmaction\nVersion: 1.0\n')
    monkeypatch.syspath_prepend(str(tmp_path / 'site'))
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setitem(config_utils.MODULE2PACKAGE, 'mmaction', 'mmaction')
    (tmp_path / 'mine.py').write_text("_base_ = ['mmaction::_base_/own.py']\n")
    assert Config.fromfile(tmp_path / 'mine.py').answer == 42


@pytest.mark.parametrize('average', [False, True])
def test_class_weights_go_with_ignored_pixels(monkeypatch, average):
    module = pytest.importorskip('mmseg.models.losses.cross_entropy_loss')
    original = getattr(module.cross_entropy, '__wrapped__', module.cross_entropy)
    monkeypatch.setattr(module, 'cross_entropy', original)
    compat.patch_class_weights()
    compat.patch_class_weights()
    assert module.cross_entropy.__wrapped__ is original
    weights = [1.0, 4.0]
    loss = module.CrossEntropyLoss(class_weight=weights, avg_non_ignore=average)
    scores = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 255]).repeat(6).view(2, 3, 3)
    expected = torch.nn.functional.cross_entropy(
        scores, labels, torch.tensor(weights), ignore_index=255
    )
    torch.testing.assert_close(loss(scores, labels, ignore_index=255), expected)


def test_only_the_missing_package_of_the_forks_is_not_told(python_without):
    """In a process of its own, since the forks tell it once."""
    for project in ('mmseg', 'mmpretrain'):
        pytest.importorskip(project)
    imports = 'import mmpretrain.datasets\nimport mmseg.datasets\n'
    said = python_without('onedl', '-c', imports)
    if 'Could not import OneDL' not in said.stdout:
        pytest.skip('upstream has no such part')
    others = (
        'from mmengine.logging import print_log\nimport logging\n'
        "print_log('a word', level=logging.DEBUG)\nprint_log('another')\n"
        "print_log('Could not import OneDL', 'current')"
    )
    done = python_without('onedl', '-c', f'import mdeq_mm\n{imports}{others}')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ['a word', 'another']
    assert (done.stdout + done.stderr).count('OneDL') == 1
