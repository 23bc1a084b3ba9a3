"""Data sets are looked for before anything is built."""

import pytest
from mmengine.config import Config

from mdeq_mm.apis import check_data

NAMES = ('train_dataloader', 'val_dataloader')


def check(dataset, **others):
    check_data(Config(dict(train_dataloader=dict(dataset=dataset), **others)), NAMES)


@pytest.fixture
def data(tmp_path):
    """A data set with one file in each of two folders."""
    for name in ('images', 'labels'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.png').touch()
    return dict(data_root=str(tmp_path), data_prefix=dict(img='images', seg='labels'))


def wrappers(dataset):
    """The data set alone, and inside the wrappers of MM."""
    return [
        dataset,
        dict(type='RepeatDataset', times=2, dataset=dataset),
        dict(type='ConcatDataset', datasets=[dict(type='OtherDataset'), dataset]),
        dict(dataset=dict(datasets=[dict(dataset=dataset)])),
        [dataset],
    ]


@pytest.mark.parametrize('wrapper', range(5))
@pytest.mark.parametrize('state', ['is empty', 'does not exist'])
def test_a_folder_that_lacks_its_files_is_named(data, tmp_path, wrapper, state):
    dataset = wrappers(data)[wrapper]
    check(dataset)
    (tmp_path / 'labels/a.png').unlink()
    if state == 'does not exist':
        (tmp_path / 'labels').rmdir()
    words = f'train_dataloader wants the folder {tmp_path}/labels, which {state}'
    with pytest.raises(FileNotFoundError, match=words):
        check(dataset)


def test_only_loaders_in_use_and_folders_that_are_here_are_looked_at(data):
    none = dict(data_root='none')
    check(data, val_dataloader=None, test_dataloader=dict(dataset=none))
    with pytest.raises(FileNotFoundError, match='^val_dataloader wants the folder none'):
        check(data, val_dataloader=dict(dataset=none))
    check(dict(data_root='s3://bucket/none'))
    check(dict(none, backend_args=dict(backend='petrel')))
    check(dict(type='NoDataset'))
    for prefix in ('images', None, dict(img='images', seg=None)):
        check(dict(data, data_prefix=prefix))
