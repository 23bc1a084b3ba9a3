"""A config made ready: read, its loaders' defaults, options merged."""

import copy
import os

import pytest
import torch
from mmengine.config import Config

from mdeq_mm.apis import fit_to_machine, load_config, merge_options, set_dataloader_defaults


def loaders(scope, **own):
    cfg = Config(dict(default_scope=scope, train_dataloader=dict(own), val_dataloader=dict(own)))
    return cfg, [cfg.train_dataloader, cfg.val_dataloader]


@pytest.mark.parametrize('gpu', [True, False])
def test_loaders_have_the_defaults_of_each_project_s_own_tools(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    cfg, found = loaders('mmpretrain')
    set_dataloader_defaults(cfg)
    collate = dict(type='default_collate')
    assert found == [dict(pin_memory=gpu, persistent_workers=True, collate_fn=collate)] * 2
    cfg, found = loaders('mmseg')
    set_dataloader_defaults(cfg)
    assert found == [dict(pin_memory=gpu)] * 2
    # A config without one of the loaders, as under --no-validate.
    cfg.val_dataloader = None
    set_dataloader_defaults(cfg)


@pytest.mark.parametrize('value', [True, False])
def test_what_a_config_says_of_its_loaders_stays_unless_a_flag_turns_it_off(value):
    own = dict(pin_memory=value, persistent_workers=value, collate_fn=dict(type='pseudo_collate'))
    cfg, found = loaders('mmpretrain', **own)
    set_dataloader_defaults(cfg)
    assert found == [own] * 2
    set_dataloader_defaults(cfg, pin_memory=False)
    assert found == [dict(own, pin_memory=False)] * 2
    set_dataloader_defaults(cfg, persistent_workers=False)
    assert found == [dict(own, pin_memory=False, persistent_workers=False)] * 2


def test_loaders_without_processes_keep_none():
    cfg, found = loaders('mmpretrain', num_workers=2, persistent_workers=True)
    cfg.train_dataloader.num_workers, cfg.launcher = 0, 'none'
    fit_to_machine(cfg)
    assert [loader.persistent_workers for loader in found] == [False, True]


def test_a_config_that_is_read_has_its_folder_and_loads_plain_data_only(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    path = tmp_path / 'own.py'
    path.write_text('a = 1\n')
    cfg = load_config(str(path))
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'
    assert (cfg.work_dir, cfg.launcher) == (os.path.join('work_dirs', 'own'), 'none')
    path.write_text("work_dir = 'here'\n")
    assert load_config(str(path)).work_dir == 'here'
    cfg = load_config(str(path), 'there', 'pytorch', dict(launcher='mpi'))
    assert (cfg.work_dir, cfg.launcher) == ('there', 'mpi')
    with pytest.raises(FileNotFoundError, match='config none.py does not exist'):
        load_config('none.py')


def test_a_shared_value_is_replaced_everywhere_it_stands():
    crop = dict(type='RandomCrop', crop_size=(8, 8))
    other = dict(type='RandomCrop', crop_size=(4, 4))
    parts = dict(
        data_preprocessor=dict(size=(8, 8)),
        model=dict(data_preprocessor=dict(size=[8, 8])),
        tta_pipeline=[dict(transforms=[[crop]])],
    )
    for name in ('train', 'val', 'test'):
        dataset = dict(data_root='a', pipeline=[crop, other], dataset=dict(data_root='b'))
        parts[f'{name}_dataloader'] = dict(dataset=dataset)
    # Without its name at the top level, nothing tells that a value is shared.
    cfg = Config(copy.deepcopy(parts))
    merge_options(cfg, dict(crop_size=(2, 3)))
    assert cfg.data_preprocessor.size == (8, 8)
    cfg = Config(dict(copy.deepcopy(parts), crop_size=(8, 8), data_root='a'))
    merge_options(cfg, dict(crop_size=(2, 3), data_root='c'))
    assert cfg.data_preprocessor.size == cfg.model.data_preprocessor.size == (2, 3)
    assert cfg.tta_pipeline[0].transforms[0][0].crop_size == (2, 3)
    for name in ('train', 'val', 'test'):
        dataset = cfg[f'{name}_dataloader'].dataset
        assert (dataset.data_root, dataset.dataset.data_root) == ('c', 'b')
        assert [step.crop_size for step in dataset.pipeline] == [(2, 3), (4, 4)]
