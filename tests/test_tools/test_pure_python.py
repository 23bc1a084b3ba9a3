"""Pure-Python configs, whose types are classes, in every tool: as configs of names are."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.model.weight_init import PretrainedInit
from torch import nn

from mdeq_mm.apis import fit_to_machine, load_config, pretrained_files, type_name
from mdeq_mm.apis.video import image_batch
from mdeq_mm.layers import MDEQGroupNorm, build_norm
from mdeq_mm.models import MDEQBackbone
from tools import test, train
from tools.analysis_tools import accuracy_vs_nfe, get_flops, inference, plot_convergence, warm_start

from ..mini_datasets import write_cityscapes, write_class_folders
from ..pure_python import write_configs

pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with both configs, trained."""
    folder = tmp_path_factory.mktemp('pure_python')
    cityscapes = write_cityscapes(folder / 'cityscapes')
    write_configs(folder, cityscapes, write_class_folders(folder / 'digits', dict(train=1, test=1)))
    for name in ('seg', 'cls'):
        train.main([str(folder / f'{name}.py'), '--work-dir', str(folder / name)])
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


@pytest.mark.parametrize('config', ['seg.py', 'seg/seg.py'], ids=['classes', 'their names'])
def test_label_maps_are_written(here, config, tmp_path):
    """A Runner writes the config into its work_dir with the classes' names in their place."""
    test.main([config, 'seg/iter_1.pth', '--out', str(tmp_path), '--work-dir', str(tmp_path / 'w')])
    assert len(list(tmp_path.glob('*.png'))) == 2


def test_views_are_averaged_and_the_config_that_is_written_can_be_read(here, tmp_path):
    runner, _ = test.main(['seg.py', 'seg/iter_1.pth', '--tta', '--work-dir', str(tmp_path)])
    assert type(runner.model).__name__ == 'SegTTAModel'
    assert type_name(Config.fromfile(tmp_path / 'seg.py').model) == 'SegTTAModel'
    # Without a model of its own, by the flip of this tool.
    flags = ['--tta', '--out', str(tmp_path / 'pred.pkl'), '--work-dir', str(tmp_path)]
    runner, _ = test.main(['cls.py', 'cls/epoch_1.pth', *flags])
    assert type(runner.model).__name__ == 'AverageClsScoreTTA'
    assert (tmp_path / 'pred.pkl').is_file()


def test_analysis_tools(here, tmp_path):
    images = here / 'cityscapes/leftImg8bit/val/lindau'
    first = str(next(images.iterdir()))
    device = ['--device', 'cpu']
    for config, image in (('seg', first), ('cls', str(here / 'digits/test/1/1_0.png'))):
        checkpoint = f'{config}/{"iter" if config == "seg" else "epoch"}_1.pth'
        out = tmp_path / f'{config}.png'
        inference.main([image, f'{config}.py', checkpoint, '--out', str(out), *device])
        assert cv2.imread(str(out)) is not None
        flags = ['--nfe', '1', '2', '--out', str(out)]
        rows = accuracy_vs_nfe.main([f'{config}.py', checkpoint, *flags])
        assert [row['nfe'] for row in rows] == [1, 2]
        flags = ['--nfe', '2', '--batches', '1', '--out', str(out), *device]
        assert plot_convergence.main([f'{config}.py', checkpoint, *flags])
        assert get_flops.main([f'{config}.py']).nfe == 4
    flags = ['--count', '1', '--frames', '2', '--window', '32', '64', '--pixels', '1']
    flags += ['--tol', '.1', '--max-iter', '2', '--out', str(tmp_path / 'warm.json'), *device]
    assert warm_start.main(['seg.py', 'seg/iter_1.pth', str(images), *flags])
    out = str(tmp_path / 'frames.avi')
    inference.main([str(images), 'seg.py', 'seg/iter_1.pth', '--out', out, *device])
    assert Path(out).is_file()


def test_a_frame_is_the_batch_that_its_file_is(here):
    """Steps that load files or labels are told by their classes."""
    cfg = load_config('seg.py')
    path = str(next((here / 'cityscapes/leftImg8bit/val/lindau').iterdir()))
    image = cv2.imread(path)[..., ::-1]
    frame, file = image_batch(cfg, image), image_batch(cfg, image, path)
    assert torch.equal(frame['inputs'][0], file['inputs'][0])
    assert 'gt_sem_seg' not in frame['data_samples'][0]


def test_without_gpus_sync_bn_becomes_bn_in_every_spelling(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cfg = load_config('seg.py', launcher='pytorch')
    # As a config that a Runner wrote, and one of OpenMMLab, name it.
    cfg.model.auxiliary_head = [
        dict(norm_cfg=dict(type='torch.nn.SyncBatchNorm')),
        dict(norm_cfg=dict(type='MMSyncBN')),
    ]
    fit_to_machine(cfg)
    norms = [cfg.model.backbone.stem_norm_cfg, cfg.model.decode_head.norm_cfg]
    norms += [head.norm_cfg for head in cfg.model.auxiliary_head]
    assert [norm.type for norm in norms] == ['BN'] * 4
    assert type_name(cfg.model.backbone.norm_cfg) == 'GroupNorm'


@pytest.mark.parametrize('config, scope', [('seg.py', 'mmseg'), ('cls.py', 'mmpretrain')])
def test_the_scope_is_that_of_the_model_where_the_config_has_none(here, config, scope):
    assert Config.fromfile(config).default_scope is None
    assert load_config(config).default_scope == scope


def test_the_scope_of_a_model_derived_from_a_project_and_of_no_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'own_parts.py').write_text(
        'from mmseg.models import EncoderDecoder\nclass Mine(EncoderDecoder): pass\n'
    )
    for name, text in dict(
        derived='from own_parts import Mine\nmodel = dict(type=Mine)',
        dotted="model = dict(type='mmpretrain.ImageClassifier')",
        own="model = dict(type='Mine')",
        given="default_scope = 'mmdet'\nmodel = dict(type='mmseg.EncoderDecoder')",
    ).items():
        (tmp_path / f'{name}.py').write_text(text)
    names = ('derived', 'dotted', 'own', 'given')
    scopes = [load_config(str(tmp_path / f'{name}.py')).default_scope for name in names]
    assert scopes == ['mmseg', 'mmpretrain', None, 'mmdet']


@pytest.mark.parametrize(
    'kind', ['PretrainedInit', 'mmengine.PretrainedInit', 'Pretrained', PretrainedInit]
)
def test_pretrained_files_are_found(kind):
    init = dict(type=kind, checkpoint='weights.pth', prefix='backbone.')
    model = dict(backbone=dict(init_cfg=init), head=dict(init_cfg=[dict(type='Normal'), init]))
    assert list(pretrained_files(Config(dict(model=model)).model)) == ['weights.pth'] * 2


def test_names_of_types():
    lazy = LazyObject('mdeq_mm.models', 'MDEQBackbone')
    kinds = [MDEQBackbone, 'MDEQBackbone', 'mdeq_mm.MDEQBackbone', lazy]
    kinds.append(LazyObject('mdeq_mm.models').MDEQBackbone)
    assert {type_name(dict(type=kind)) for kind in kinds} == {'MDEQBackbone'}
    assert type_name(None) == 'None'


@pytest.mark.parametrize('kind', ['GN', nn.GroupNorm, 'torch.nn.GroupNorm'])
def test_group_norm_is_ours_in_every_spelling(kind):
    assert isinstance(build_norm(dict(type=kind, num_groups=2), 4), MDEQGroupNorm)
    with pytest.raises(ValueError, match='stem_norm_cfg=.* lacks num_groups'):
        MDEQBackbone(channels=(8,), stem_norm_cfg=dict(type=kind))
    with pytest.raises(ValueError, match='8 channels do not split into 3 groups'):
        MDEQBackbone(channels=(8,), stem_norm_cfg=dict(type=kind, num_groups=3))


def test_a_group_norm_of_ones_own_is_left_alone():
    class GroupNorm(nn.GroupNorm):
        def __init__(self, channels, num_groups, eps):
            super().__init__(num_groups, channels, eps)

    assert type(build_norm(dict(type=GroupNorm, num_groups=2), 4)) is GroupNorm


def test_classes_learn_what_their_names_learn(here):
    """The same weights after the same step."""
    options = ['--cfg-options', 'randomness.seed=0', 'train_cfg.max_iters=1']
    ends = [
        train.main([config, '--work-dir', 'same', '--no-validate', *options]).model.state_dict()
        for config in ('seg.py', 'seg/seg.py')
    ]
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(*(e.values() for e in ends)))
