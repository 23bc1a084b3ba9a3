"""What a wheel holds, what an install asks for, and that things are written once."""

import filecmp
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mdeq_mm

from .processes import run_python

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The files a wheel would hold, built outside of the working tree, and the metadata."""
    folder = tmp_path_factory.mktemp('build')
    build = ['build', '--build-base', folder, '--build-lib', folder / 'lib']
    run_python('setup.py', '-q', 'egg_info', '--egg-base', folder, *build, cwd=ROOT)
    return folder


def test_a_wheel_holds_every_config_and_tool(built):
    mim = built / 'lib' / 'mdeq_mm' / '.mim'
    for name in ('configs', 'tools'):
        wanted = {p.relative_to(ROOT) for p in (ROOT / name).rglob('*.py')}
        held = {p.relative_to(mim) for p in (mim / name).rglob('*.py')}
        assert wanted and held == wanted
    assert not [p for p in mim.rglob('*') if p.name == '__pycache__' or p.name[0] == '.']


def test_a_wheel_holds_every_module(built):
    wanted = {p.relative_to(ROOT) for p in (ROOT / 'mdeq_mm').rglob('*.py')}
    lib = built / 'lib'
    held = {p.relative_to(lib) for p in lib.rglob('*.py')}
    assert held - {p for p in held if '.mim' in p.parts} == wanted


# Each as a script of its own, from the folder that holds it, where only the built package is.
ALL_HELP = """
import runpy, sys
from pathlib import Path
for path in sorted(Path(sys.argv.pop(1)).rglob('*.py')):
    if path.name.startswith('_') or path.parent.name == 'benchmarks' and path.stem != 'run':
        continue
    sys.argv, sys.path[0] = [str(path), '--help'], str(path.parent)
    try:
        runpy.run_path(str(path), run_name='__main__')
    except SystemExit as stop:
        assert stop.code == 0, path
        print('helped by', path.stem)
"""


def test_the_tools_of_a_wheel_run_from_any_folder(built, tmp_path):
    lib = built / 'lib'
    tools = lib / 'mdeq_mm' / '.mim' / 'tools'
    done = run_python('-c', ALL_HELP, tools, cwd=tmp_path, env={'PYTHONPATH': str(lib)})
    helped = set(re.findall(r'^helped by (\w+)$', done.stdout, re.MULTILINE))
    wanted = {path.stem for path in (ROOT / 'tools').rglob('*.py') if path.name[0] != '_'}
    suites = {path.stem for path in (ROOT / 'tools/benchmarks').glob('*.py')}
    assert helped == wanted - suites | {'run'}


def test_a_wheel_holds_what_a_machine_builds(built):
    sources = [p.relative_to(ROOT) for p in (ROOT / 'mdeq_mm/kernels/csrc').iterdir()]
    assert {p.suffix for p in sources} == {'.cpp', '.h'}
    assert [p for p in sources if not (built / 'lib' / p).is_file()] == []


def test_a_wheel_holds_the_weights(built):
    weights = [path.relative_to(ROOT) for path in (ROOT / 'mdeq_mm/weights').iterdir()]
    assert weights and {path.suffix for path in weights} == {'.pth'}
    for path in weights:
        assert filecmp.cmp(built / 'lib' / path, ROOT / path, shallow=False), path


def test_building_leaves_nothing_in_the_package(built):
    assert built.exists()
    assert not (ROOT / 'mdeq_mm' / '.mim').exists()


def _metadata(built, field):
    text = next(built.glob('*.egg-info/PKG-INFO')).read_text()
    return re.findall(rf'^{field}: (.+)$', text.split('\n\n')[0], flags=re.MULTILINE)


def test_metadata(built):
    assert _metadata(built, 'Version') == [mdeq_mm.__version__]
    assert set(_metadata(built, 'Provides-Extra')) == {'onedl', 'mim', 'tests', 'optional', 'docs'}


def test_no_openmmlab_package_without_an_extra(built):
    # Two mmengines must never meet: the family is chosen by an extra.
    # Older setuptools write them to a file of their own; importlib reads either.
    recorded = importlib.metadata.Distribution.at(next(built.glob('*.egg-info'))).requires
    requirements = [Requirement(line) for line in recorded]
    always = {r.name for r in requirements if r.marker is None}
    assert always == {'ninja', 'numpy', 'torch'}

    def of(extra):
        chosen = [r for r in requirements if r.marker and r.marker.evaluate({'extra': extra})]
        return {r.name for r in chosen if 'mm' in r.name}

    assert len(of('onedl')) == 4
    assert [name for name in of('onedl') if not name.startswith('onedl-')] == []
    assert of('mim') == {'mmengine', 'mmcv', 'mmsegmentation', 'mmpretrain'}
    assert not of('tests') and not of('optional')


def test_importing_the_package_loads_no_other_project():
    code = (
        'import sys, mdeq_mm;'
        'print([m for m in ("mmseg", "mmpretrain", "mmdet", "sklearn") if m in sys.modules])'
    )
    assert run_python('-c', code).stdout.strip() == '[]'
