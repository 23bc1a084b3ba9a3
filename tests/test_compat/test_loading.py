"""Checkpoints: plain data loads, and files that could run code do not."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mdeq_mm import compat
from mdeq_mm.compat import loading


class _Payload:
    """Touches a file when it is unpickled by an unprotected loader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


class _Named:
    """A harmless object that a checkpoint must nevertheless not contain."""


class _ReadsAttribute:
    """Asks the loader for an attribute that could lead anywhere."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


@pytest.mark.parametrize('zipped', [True, False])
def test_a_payload_is_refused_and_not_run(tmp_path, zipped):
    touched, path = tmp_path / 'touched', tmp_path / 'hostile.pth'
    content = dict(state_dict={}, meta=_Payload(touched))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(compat.UnsafeCheckpointError, match=r'hostile\.pth.*names \w+\.system'):
        compat.verify_checkpoint(str(path))
    assert not touched.exists()
    # The payload is a real one: without protection it does run.
    torch.load(path, weights_only=False)
    assert touched.exists()


def test_a_foreign_class_is_refused_by_name(tmp_path):
    path = str(tmp_path / 'foreign.pth')
    torch.save(dict(meta=_Named()), path)
    with pytest.raises(compat.UnsafeCheckpointError, match=r'test_loading\._Named.*torch\.save'):
        compat.verify_checkpoint(path)


@pytest.mark.parametrize(
    'arguments',
    [(HistoryBuffer, '__init__'), (np.ndarray, 'tofile'), (torch.FloatStorage, 'from_file')],
)
def test_getattr_reaches_methods_of_the_history_only(tmp_path, arguments):
    path = str(tmp_path / 'attribute.pth')
    torch.save(dict(meta=_ReadsAttribute(*arguments)), path)
    with pytest.raises(compat.UnsafeCheckpointError, match=r'builtins\.getattr'):
        compat.verify_checkpoint(path)


def test_forced_safe_loading_closes_mmengines_fallback(tmp_path, monkeypatch):
    # Set and restored by monkeypatch, so that other tests are not affected.
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    touched, path = tmp_path / 'touched', str(tmp_path / 'hostile.pth')
    torch.save(dict(state_dict={}, meta=_Payload(touched)), path)
    compat.force_safe_loading()
    from mmengine.runner.checkpoint import CheckpointLoader

    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(path, map_location='cpu')
    assert not touched.exists()


class _Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, mode='tensor'):
        return dict(loss=self.linear(torch.stack(x)).square().mean())


@pytest.fixture
def checkpoint(tmp_path):
    """A file that mmengine's Runner saved after training, with everything it stores."""
    runner = Runner(
        model=_Net(),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=1,
            dataset=[dict(x=torch.ones(2))] * 2,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=2),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.1)),
        # MultiStepLR keeps its milestones in a Counter.
        param_scheduler=dict(type='MultiStepLR', milestones=[1], by_epoch=False),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False)),
        custom_hooks=[dict(type='EMAHook')],
        default_scope='mmengine',
        experiment_name=f'compat_{tmp_path.name}',
        log_level='ERROR',
    )
    hub = MessageHub.get_current_instance()
    hub.update_scalar('train/kept', 1.5)
    # Metrics are numpy scalars of many types.
    for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_):
        hub.update_info(kind.__name__, kind(1))
    runner.train()
    return str(tmp_path / 'iter_2.pth')


def test_mmengines_checkpoint_passes(checkpoint):
    loaded = compat.verify_checkpoint(checkpoint)
    assert {'state_dict', 'ema_state_dict', 'optimizer', 'message_hub', 'meta'} <= loaded.keys()
    assert isinstance(loaded['param_schedulers'][0]['milestones'], collections.Counter)
    hub = loaded['message_hub']
    assert hub['log_scalars']['train/kept'].statistics('mean') == 1.5
    assert hub['runtime_info']['float32'].dtype == np.float32


def test_mmengine_loads_it_under_forced_protection(checkpoint, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    compat.force_safe_loading()
    from mmengine.runner.checkpoint import CheckpointLoader

    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    assert loaded['meta']['iter'] == 2
    # mmengine withdraws its own allowances after a load; ours stay.
    assert 'message_hub' in torch.load(checkpoint, weights_only=True)


@pytest.mark.parametrize('core', ['numpy.core', 'numpy._core'])
def test_pickles_of_numpy_1_and_2_are_read(tmp_path, core):
    path = tmp_path / 'numpy.pth'
    torch.save(dict(a=np.arange(3.0), b=np.float32(2)), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for name in (b'numpy._core.multiarray', b'numpy.core.multiarray'):
        content = content.replace(b'c' + name + b'\n', b'c' + core.encode() + b'.multiarray\n')
    assert core.encode() + b'.multiarray' in content
    path.write_bytes(content)
    loaded = compat.verify_checkpoint(str(path))
    assert loaded['a'].tolist() == [0.0, 1.0, 2.0] and loaded['b'] == 2


def test_what_is_allowed_are_the_log_and_numbers():
    core = getattr(np, '_core', None) or np.core
    numbers = [type(np.dtype(code)) for code in '?bBhHiIlLqQpPefdg']
    wanted = {
        'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
        'builtins.getattr': loading._history_method,
        'numpy.ndarray': np.ndarray,
        'numpy.dtype': np.dtype,
        **{f'{kind.__module__}.{kind.__qualname__}': kind for kind in numbers},
    }
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        wanted[f'{module}._reconstruct'] = core.multiarray._reconstruct
        wanted[f'{module}.scalar'] = core.multiarray.scalar
    assert {name: thing for thing, name in loading._mm_globals()} == wanted


@pytest.mark.parametrize('kind', ['O', 'V8', 'M8[s]', 'S3', 'U3'])
def test_arrays_hold_numbers_and_booleans_only(tmp_path, kind):
    """An object array can pickle anything, and nobody needs the other dtypes."""
    path = str(tmp_path / 'array.pth')
    torch.save(dict(state_dict={}, meta=np.zeros(2, dtype=kind)), path)
    with pytest.raises(compat.UnsafeCheckpointError, match=r'names numpy\.dtypes\.\w+DType,'):
        compat.verify_checkpoint(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        compat.verify_checkpoint(str(tmp_path / 'nowhere.pth'))


@pytest.mark.parametrize('content', [b'', b'hello world', b'PK\x03\x04 and no more'])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / 'notes.txt'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'notes\.txt.* is not a checkpoint'):
        compat.verify_checkpoint(str(path))


def test_a_checkpoint_is_a_dict(tmp_path):
    path = str(tmp_path / 'tensor.pth')
    torch.save(torch.ones(2), path)
    with pytest.raises(ValueError, match='holds a Tensor'):
        compat.verify_checkpoint(path)
