"""The stack check, on made-up environments."""

import importlib.metadata
import importlib.util
import types
from pathlib import Path

import pytest

from mdeq_mm import check, compat

from ..processes import run_python

ROOT = Path(__file__).resolve().parents[2]
MODULE_OF = {name: package.module for package in compat.PACKAGES for name in package.distributions}
ONEDL = ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmsegmentation', 'onedl-mmpretrain')
UPSTREAM = ('mmengine', 'mmcv', 'mmsegmentation', 'mmpretrain')


@pytest.fixture
def environment(monkeypatch):
    """Pretends that exactly these OpenMMLab distributions are installed."""

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
    assert message.endswith(f'Fix it with: {command}')
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


@pytest.mark.parametrize('hidden', ['mmengine', 'mmengine mmcv mmseg mmpretrain', 'torch', 'numpy'])
def test_check_answers_where_the_package_cannot_be_imported(python_without, hidden):
    done = python_without(hidden, '-m', 'mdeq_mm.check', expect=1)
    assert not done.stderr
    table, _, rest = done.stdout.partition('\n\n')
    assert len(table.splitlines()) == 4 + len(compat.PACKAGES)
    for module in hidden.split():
        if module not in ('torch', 'numpy'):
            assert 'missing, needed by' in next(
                line for line in table.splitlines() if line.startswith(f'{module} ')
            )
    assert 'Fix it with: pip ' in rest and hidden.split()[0] in rest


# The gradient of sum(z*) for z = A z + x: (I - A')^-1 applied to ones.
CORE_ALONE = """
import sys
import torch
import mdeq_mm, mdeq_mm.options
from mdeq_mm.deq import Anderson, ImplicitGradient, ImplicitLayer, LimitedMemoryBroyden, solve

a = torch.tensor([[0.5, 0.2, 0.0], [-0.3, 0.1, 0.4], [0.0, 0.2, -0.6]], dtype=torch.float64)
x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
solver = LimitedMemoryBroyden(max_iter=50, tol=1e-12)
layer = ImplicitLayer(solver, ImplicitGradient(solver))
z = layer(lambda z: z @ a.T + x, torch.zeros_like(x))
inverse = torch.linalg.inv(torch.eye(3, dtype=torch.float64) - a)
torch.testing.assert_close(z, x @ inverse.T)
z.sum().backward()
torch.testing.assert_close(x.grad, torch.ones_like(x) @ inverse)
found = solve(torch.cos, torch.zeros(1, 1, dtype=torch.float64), Anderson(max_iter=50, tol=1e-12))
assert abs(found.z.item() - 0.7390851332151607) < 1e-10
assert not [m for m in sys.modules if m.startswith(('mmengine', 'mmcv', 'mmseg', 'mmpretrain'))]
print(mdeq_mm.deq.__name__)
"""


@pytest.mark.parametrize('hidden', ['mmengine mmcv', 'mmengine mmcv mmseg mmpretrain mmdet'])
def test_the_core_works_where_no_openmmlab_package_is(python_without, hidden):
    done = python_without(hidden, '-c', CORE_ALONE)
    assert done.stdout == 'mdeq_mm.deq\n'
    done = python_without(f'{hidden} torch', '-c', 'import mdeq_mm', expect=1)
    assert "No module named 'torch'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('module', ['mmengine', 'mmcv', 'torch', 'numpy'])
def test_a_user_of_a_broken_environment_is_sent_to_the_check(python_without, module):
    done = python_without(module, '-c', 'import mdeq_mm', expect=1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith('ImportError: ')
    assert 'python -m mdeq_mm.check' in last and 'Fix it with: pip' in last


def test_a_module_that_is_there_and_broken_is_named(python_without, tmp_path):
    # Found, so that the stack looks complete, but broken inside.
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').write_text("raise ImportError('libmade_up.so: not found')\n")
    done = python_without('', '-m', 'mdeq_mm.check', expect=1)
    assert not done.stderr
    assert 'mmcv is installed but cannot be imported: ImportError: libmade_up.so' in done.stdout
    done = python_without('', '-c', 'import mdeq_mm', expect=1)
    assert 'libmade_up.so' in done.stderr.splitlines()[-1]
    assert 'python -m mdeq_mm.check' in done.stderr.splitlines()[-1]


def test_a_check_by_assert_inside_a_package_is_one_sentence(python_without, tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').write_text("assert False, 'mmengine is too old'\n")
    done = python_without('', '-c', 'import mdeq_mm', expect=1)
    last = done.stderr.splitlines()[-1]
    assert last.startswith('ImportError: mdeq_mm cannot be imported (AssertionError: mmengine is')
    done = python_without('', '-m', 'mdeq_mm.check', expect=1)
    assert not done.stderr and 'mmengine is too old' in done.stdout


def test_the_check_is_content_with_this_environment():
    run_python('-m', 'mdeq_mm.check')
