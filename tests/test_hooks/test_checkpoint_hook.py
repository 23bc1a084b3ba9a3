"""Old checkpoints stay until the new one is whole, whatever goes wrong in between."""

import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import LocalBackend
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mdeq_mm.hooks import MDEQCheckpointHook
from mdeq_mm.hooks.checkpoint_hook import WholeFileBackend


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.layer(torch.stack(inputs)).sum()) if mode == 'loss' else inputs


class Score(BaseMetric):
    """Better at each validation."""

    score = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.score += 1
        return dict(score=self.score)


def run(tmp_path, **checkpoint):
    loader = dict(
        batch_size=1,
        dataset=[dict(inputs=torch.ones(1))],
        sampler=dict(type='InfiniteSampler', shuffle=False),
    )
    options = dict(by_epoch=False, interval=1, max_keep_ckpts=1, **checkpoint)
    runner = Runner(
        model=Net(),
        work_dir=str(tmp_path),
        train_dataloader=loader,
        val_dataloader={**loader, 'sampler': dict(type='DefaultSampler', shuffle=False)},
        val_evaluator=Evaluator([Score()]),
        train_cfg=dict(by_epoch=False, max_iters=3, val_interval=1),
        val_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(checkpoint=dict(type='MDEQCheckpointHook', **options)),
        default_scope='mmengine',
        experiment_name=f'checkpoint_{tmp_path.parent.name}_{tmp_path.name}',
        log_level='ERROR',
    )
    runner.train()
    return runner


def checkpoints(folder):
    return sorted(path.name for path in folder.rglob('*.pth*'))


@pytest.fixture
def full_disk(monkeypatch):
    """Give a function that makes the disk full at the n-th write of a file."""
    whole = LocalBackend.put

    def fill(name, times=1):
        left = [times]

        def put(backend, obj, filepath):
            if str(filepath).endswith((name, f'{name}.part')):
                left[0] -= 1
                if not left[0]:
                    whole(backend, obj[: len(obj) // 2], filepath)
                    raise OSError('No space left on device')
            whole(backend, obj, filepath)

        monkeypatch.setattr(LocalBackend, 'put', put)

    return fill


def test_a_run_that_goes_well_leaves_what_mms_hook_leaves(tmp_path):
    run(tmp_path, save_best='score', rule='greater')
    assert checkpoints(tmp_path) == ['best_score_iter_3.pth', 'iter_3.pth']
    meta = torch.load(tmp_path / 'iter_3.pth', weights_only=False)['meta']
    assert (meta['iter'], meta['epoch']) == (3, 0)
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_3.pth')


def test_a_better_score_at_the_same_step_is_written_over_the_one_before(tmp_path):
    """What is removed at the end is not what was written just now."""
    runner = run(tmp_path, save_best='score', rule='greater')
    best = tmp_path / 'best_score_iter_3.pth'
    best.write_bytes(b'')
    runner.val()
    assert torch.load(best, weights_only=False)['state_dict']
    assert checkpoints(tmp_path) == ['best_score_iter_3.pth', 'iter_3.pth']


def test_a_disk_that_is_full_takes_neither_the_last_checkpoint_nor_the_best(tmp_path, full_disk):
    full_disk('best_score_iter_2.pth')
    with pytest.raises(OSError, match='No space'):
        run(tmp_path, save_best='score', rule='greater')
    assert set(checkpoints(tmp_path)) == {
        'best_score_iter_1.pth',
        'best_score_iter_2.pth.part',
        'iter_2.pth',
    }
    for path in tmp_path.glob('*.pth'):
        assert torch.load(path, weights_only=False)['state_dict']


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path, full_disk):
    full_disk('iter_2.pth')
    with pytest.raises(OSError, match='No space'):
        run(tmp_path)
    assert checkpoints(tmp_path) == ['iter_1.pth', 'iter_2.pth.part']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_1.pth')


def test_a_folder_of_its_own(tmp_path):
    out_dir = tmp_path / 'elsewhere'
    run(tmp_path / 'work', save_best='score', rule='greater', out_dir=str(out_dir))
    assert checkpoints(out_dir) == ['best_score_iter_3.pth', 'iter_3.pth']
    assert checkpoints(tmp_path / 'work') == []


def test_a_backend_of_the_users_own_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(WholeFileBackend, 'put', lambda *_: pytest.fail('written by our backend'))
    run(tmp_path, backend_args=dict(backend='local'))
    assert checkpoints(tmp_path) == ['iter_3.pth']


@pytest.mark.parametrize(
    'options, whole',
    [
        (dict(), True),
        (dict(backend_args=dict(backend='local')), False),
        (dict(file_client_args=dict(backend='disk')), False),
    ],
)
def test_files_are_written_whole_unless_the_user_names_a_backend(tmp_path, options, whole):
    hook = MDEQCheckpointHook(interval=1, **options)
    hook.before_train(SimpleNamespace(work_dir=str(tmp_path), epoch=0, iter=0, logger=MagicMock()))
    backend = getattr(hook.file_backend, 'client', hook.file_backend)
    assert isinstance(backend, LocalBackend) and isinstance(backend, WholeFileBackend) == whole


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut after the rename leaves an empty file under the name."""
    path, events, sync, rename = tmp_path / 'a.pth', [], os.fsync, os.replace

    def fsync(descriptor):
        events.append(('synced', os.fstat(descriptor).st_size, path.exists()))
        sync(descriptor)

    def replace(source, target):
        events.append(('renamed', str(source), str(target)))
        rename(source, target)

    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'replace', replace)
    WholeFileBackend().put(b'whole', str(path))
    assert events == [('synced', 5, False), ('renamed', f'{path}.part', str(path))]
    assert path.read_bytes() == b'whole'
