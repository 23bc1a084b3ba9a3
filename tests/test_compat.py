"""The stack check, on made-up environments, and the loading of checkpoints."""

import collections
import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mdeq_mm import check, compat

ROOT = Path(__file__).resolve().parents[1]
MODULE_OF = {
    name: package.module
    for package in compat.PACKAGES
    for name in (package.onedl, *map(compat._distribution_name, package.upstream))
}
ONEDL = ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmsegmentation', 'onedl-mmpretrain')
UPSTREAM = ('mmengine', 'mmcv', 'mmsegmentation', 'mmpretrain')


@pytest.fixture
def environment(monkeypatch):
    """Makes the process believe that exactly these OpenMMLab distributions are installed."""

    def pretend(*installed, modules=None, others=('numpy', 'torch')):
        present = {MODULE_OF[name] for name in installed} if modules is None else set(modules)
        present |= set(others)

        def version(name):
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return '1.0'

        monkeypatch.setattr(importlib.metadata, 'version', version)
        # Without the folders where compiled operators would be looked for.
        spec = types.SimpleNamespace(submodule_search_locations=None)
        monkeypatch.setattr(
            importlib.util, 'find_spec', lambda name: spec if name in present else None
        )

    return pretend


@pytest.mark.parametrize(
    'installed',
    [
        ONEDL,
        ONEDL[:2],
        UPSTREAM,
        UPSTREAM[:2],
        ('mmengine', 'mmcv-lite'),
        ('mmengine-lite', 'mmcv'),
    ],
)
def test_one_whole_stack_is_accepted(environment, installed):
    environment(*installed)
    compat.check_stack()


def test_modules_without_a_distribution_are_accepted(environment):
    environment(modules=('mmengine', 'mmcv'))
    compat.check_stack()


@pytest.mark.parametrize(
    'installed, named, command',
    [
        ((), 'needs mmengine and mmcv,', 'pip install onedl-mmengine onedl-mmcv'),
        (('onedl-mmengine',), 'needs mmcv,', 'pip install onedl-mmcv'),
        (('mmengine',), 'needs mmcv,', 'pip install "mmcv<2.2"'),
        (
            ('onedl-mmengine', 'onedl-mmcv', 'mmengine'),
            'onedl-mmengine and mmengine overwrite each other',
            'pip uninstall -y onedl-mmengine mmengine && pip install onedl-mmengine',
        ),
        (
            ('onedl-mmengine', 'onedl-mmcv', 'mmcv-lite'),
            'onedl-mmcv and mmcv-lite overwrite each other',
            'pip uninstall -y onedl-mmcv mmcv-lite && pip install onedl-mmcv',
        ),
        (
            ('mmengine', 'mmcv', 'mmcv-lite'),
            'mmcv and mmcv-lite overwrite each other',
            'pip uninstall -y mmcv mmcv-lite && pip install "mmcv<2.2"',
        ),
        (
            ('onedl-mmengine', 'onedl-mmcv', 'mmsegmentation'),
            'onedl-mmengine, onedl-mmcv (OneDL) and mmsegmentation (upstream OpenMMLab)',
            'pip uninstall -y mmsegmentation && pip install onedl-mmsegmentation',
        ),
    ],
)
def test_a_broken_stack_is_named_with_its_remedy(environment, installed, named, command):
    environment(*installed)
    with pytest.raises(ImportError) as caught:
        compat.check_stack()
    message = str(caught.value)
    assert named in message
    assert message.endswith(f'Mend it with: {command}')
    assert 'python -m mdeq_mm.check' in message
    assert '\n' not in message


def test_a_distribution_that_lost_its_files_is_reinstalled(environment):
    # What is left after `pip uninstall mmengine` where both mmengines were.
    environment('onedl-mmengine', 'onedl-mmcv', modules=('mmcv',))
    with pytest.raises(ImportError, match='uninstall -y onedl-mmengine && pip install onedl-mmeng'):
        compat.check_stack()


def test_missing_torch_is_named(environment):
    environment(*ONEDL, others=('numpy',))
    with pytest.raises(ImportError, match='needs torch.*pip install torch$'):
        compat.check_stack()


def test_check_lists_what_is_missing(environment):
    environment('onedl-mmengine', 'onedl-mmcv', 'onedl-mmpretrain')
    lines = check.table()
    assert any(line.split() == ['mmpretrain', 'onedl-mmpretrain', '1.0'] for line in lines)
    assert any(line.startswith('mmseg       missing, needed by segm') for line in lines)
    commands = check.optional_commands()
    assert 'To use segmentation configs: pip install onedl-mmsegmentation' in commands
    assert not any('pip install onedl-mmpretrain' in line for line in commands)


def test_check_says_what_is_doubled_and_the_remedy(environment, capsys):
    environment('onedl-mmengine', 'onedl-mmcv', 'mmcv')
    assert check.main() == 1
    out = capsys.readouterr().out
    assert 'mmcv        onedl-mmcv 1.0, mmcv 1.0: doubled\n' in out
    assert out.endswith('pip uninstall -y onedl-mmcv mmcv && pip install onedl-mmcv\n')


@pytest.mark.parametrize(
    'installed, needy',
    [
        ((*ONEDL, 'onedl-mmdetection'), 'mmdet cannot'),
        (UPSTREAM, 'mmseg cannot'),
        (ONEDL, None),
        (('mmengine', 'mmcv', 'mmpretrain'), None),
    ],
)
def test_check_knows_who_needs_compiled_operators(
    environment, monkeypatch, tmp_path, installed, needy
):
    environment(*installed)
    said = [line for line in check.optional_commands() if 'operators' in line]
    if needy is None:
        assert not said
    else:
        (line,) = said
        assert line.startswith(needy) and 'MMCV_WITH_OPS=1 pip install --no-build-iso' in line
        assert line.endswith('"mmcv<2.2"' if 'mmcv' in installed else '"onedl-mmcv"')
    (tmp_path / '_ext.cpython-311-x86_64-linux-gnu.so').touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
    assert not any('operators' in line for line in check.optional_commands())


# Runs before a program's first line, and hides the modules named in HIDDEN from it.
BLOCKER = """
import os
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in os.environ['HIDDEN'].split():
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Hide())

import importlib.util

original = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name in os.environ['HIDDEN'].split() else original(name, package)
)
"""


@pytest.fixture
def python_without(tmp_path):
    """Runs Python in a process of its own that cannot import some modules."""

    def run(hidden, *arguments, folder=tmp_path):
        (tmp_path / 'sitecustomize.py').write_text(BLOCKER)
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        env = {**os.environ, 'PYTHONPATH': path, 'HIDDEN': hidden}
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize('hidden', ['mmengine', 'mmengine mmcv mmseg mmpretrain', 'torch', 'numpy'])
def test_check_answers_where_the_package_cannot_be_imported(python_without, hidden):
    done = python_without(hidden, '-m', 'mdeq_mm.check')
    assert done.returncode == 1 and not done.stderr
    table, _, rest = done.stdout.partition('\n\n')
    assert len(table.splitlines()) == 4 + len(compat.PACKAGES)
    for module in hidden.split():
        if module not in ('torch', 'numpy'):
            assert 'missing, needed by' in next(
                line for line in table.splitlines() if line.startswith(f'{module} ')
            )
    assert 'Mend it with: pip ' in rest and hidden.split()[0] in rest


def test_a_user_of_a_broken_environment_is_sent_to_the_check(python_without):
    done = python_without('mmcv', '-c', 'import mdeq_mm')
    last = done.stderr.splitlines()[-1]
    assert done.returncode and last.startswith('ImportError: ')
    assert 'python -m mdeq_mm.check' in last and 'Mend it with: pip' in last


def test_a_module_that_is_there_and_broken_is_named(python_without, tmp_path):
    # Found, so that the stack looks whole, and wrong inside.
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').write_text("raise ImportError('libmade_up.so: not found')\n")
    done = python_without('', '-m', 'mdeq_mm.check')
    assert done.returncode == 1 and not done.stderr
    assert 'mmcv is there but cannot be imported: ImportError: libmade_up.so' in done.stdout
    done = python_without('', '-c', 'import mdeq_mm')
    assert done.returncode and 'libmade_up.so' in done.stderr.splitlines()[-1]
    assert 'python -m mdeq_mm.check' in done.stderr.splitlines()[-1]


def test_the_check_is_content_with_this_environment():
    done = subprocess.run(
        [sys.executable, '-m', 'mdeq_mm.check'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
    # Newer setuptools has no pkg_resources, which upstream's mmengine would ask.
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
    compat.mend_class_weights()
    compat.mend_class_weights()
    assert module.cross_entropy.__wrapped__ is original
    weights = [1.0, 4.0]
    loss = module.CrossEntropyLoss(class_weight=weights, avg_non_ignore=average)
    scores = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 255]).repeat(6).view(2, 3, 3)
    expected = torch.nn.functional.cross_entropy(
        scores, labels, torch.tensor(weights), ignore_index=255
    )
    torch.testing.assert_close(loss(scores, labels, ignore_index=255), expected)


class _Payload:
    """Touches a file when it is unpickled by an unprotected loader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


class _Named:
    """An object that does no harm; a checkpoint still must not bring it."""


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
    with pytest.raises(compat.UnsafeCheckpointError, match=r'test_compat\._Named.*torch\.save'):
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
    # Set and restored by monkeypatch, so that the other tests do not feel it.
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
    """A file that mmengine's Runner saved after training, with all it puts in."""
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
