"""Every command of README.md and docs/: its script, flags, configs and settings exist.

Those that take seconds are run as well. Training and the analysis tools have their own tests, on
small data.
"""

import argparse
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, TASK_UTILS, DefaultScope, init_default_scope
from packaging.requirements import Requirement

import mdeq_mm  # noqa: F401

from .checks import assert_finite, grads
from .grad_cam import provide_grad_cam
from .processes import run, run_python

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob('docs/*.md')) + [ROOT / 'README.md']
# A shell's own lines: they set up what the commands below them name.
SETTING = re.compile(r'\w+\(\) \{|\w+=')


def fenced(page, language):
    return re.findall(rf'```{language}\n(.*?)```', page.read_text(), flags=re.DOTALL)


def commands_of(page):
    """The page's commands as lists of arguments, as bash itself splits and expands them."""
    text = '\n'.join(fenced(page, 'bash')).replace('\\\n', ' ')
    script = ['set -eu']
    for line in text.splitlines():
        if SETTING.match(line):
            script.append(line)
        elif line.strip() and not line.startswith('#'):
            script += [f"printf '%s\\n' {line}", 'echo']
    if len(script) == 1:
        return []
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = run(['bash', '-c', '\n'.join(script)], cwd=ROOT, env={'PATH': path})
    return [block.split('\n') for block in done.stdout.strip('\n').split('\n\n')]


# A command that several pages give is tried once, under the name of the first.
COMMANDS = [
    pytest.param(list(command), id=f'{page.name}: {" ".join(command)[:90]}')
    for command, page in {
        tuple(command): page for page in reversed(PAGES) for command in commands_of(page)
    }.items()
]


class Parsed(Exception):
    """Raised instead of continuing once the command line has been parsed."""


@pytest.fixture
def parse(monkeypatch):
    """Give a function that lets a script read a command line, and stops it there."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    def run(path, arguments):
        with monkeypatch.context() as patch, pytest.raises(Parsed) as found:
            if Path(path).name == 'vis_cam.py':
                provide_grad_cam(patch)
            patch.setattr(sys, 'argv', [str(path), *arguments])
            patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
            # Where Python itself looks first for what a script imports.
            patch.syspath_prepend(str(Path(path).parent))
            runpy.run_path(str(path), run_name='__main__')
        return found.value.args[0]

    return run


def check_configs(arguments, options):
    """The configs that a command names exist; settings of ours make a model that builds."""
    for name in arguments:
        if re.search(r'(^|/)configs/.*\.py$', name):
            assert (ROOT / name).is_file(), f'{name} does not exist'
            if options and name.startswith('configs/'):
                build(Config.fromfile(ROOT / name), options)


def build(cfg, options):
    before = set(flat(cfg))
    cfg.merge_from_dict(options)
    # A new key is a misspelt one, unless it belongs to a part whose class may take it.
    new = [key for key in options if key not in before and not key.startswith('model.')]
    assert [key for key in new if not key.startswith('optim_wrapper.')] == []
    if cfg.default_scope == 'mmdet':
        for module in ('mmdet', 'mmcv._ext'):
            pytest.importorskip(module)
    init_default_scope(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        MODELS.build(cfg.model)


def flat(node, prefix=''):
    """Every dotted name in a config, inner nodes included."""
    items = enumerate(node) if isinstance(node, (list, tuple)) else node.items()
    for key, value in items:
        yield f'{prefix}{key}'
        if isinstance(value, (dict, list, tuple)):
            yield from flat(value, f'{prefix}{key}.')


def check_make(*targets):
    """Targets of the Makefile, and variables that it reads."""
    text = (ROOT / 'Makefile').read_text()
    for target in targets:
        name, is_variable, _ = target.partition('=')
        if is_variable:
            assert re.search(rf'\$[({{]*{name}\b', text), f'no variable {name}'
        else:
            assert re.search(rf'^{name}:', text, flags=re.MULTILINE), f'no target {name}'


def check_pip(verb, *arguments):
    assert verb == 'install'
    parser = argparse.ArgumentParser()
    parser.add_argument('names', nargs='*')
    parser.add_argument('-e', '--editable', dest='names', action='append')
    parser.add_argument('-r', '--requirement')
    parser.add_argument('--target')
    parser.add_argument('--no-deps', action='store_true')
    found = parser.parse_args(arguments)
    if found.requirement:
        assert (ROOT / found.requirement).is_file(), f'{found.requirement} does not exist'
    for name in found.names:
        if name.startswith('.['):
            extras = Requirement(f'mdeq-mm{name[1:]}').extras
            known = re.findall(r"'(\w+)': requirements\(", (ROOT / 'setup.py').read_text())
            assert extras <= set(known)
        else:
            # Another project: one that the requirements or a tool of this one asks for.
            files = [*ROOT.glob('requirements/*.txt'), *ROOT.glob('tools/**/*.py')]
            asked = any(name in file.read_text() for file in files)
            assert name == '.' or asked, name


def check_module(name, *arguments):
    """A module run by ``python -m``: cheap enough to run."""
    assert not arguments
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name='__main__', alter_sys=True)
    assert not ended.value.code, ended.value.code


@pytest.mark.parametrize('command', COMMANDS)
def test_command(command, parse):
    program, *arguments = command
    if program in ('git', 'cd'):
        return None
    if program == 'make':
        return check_make(*arguments)
    if program == 'pip':
        return check_pip(*arguments)
    if program == 'python' and arguments[0] == '-m':
        return check_module(*arguments[1:])
    assert program in ('python', 'bash')
    script, *rest = arguments
    path = ROOT / script
    assert path.is_file(), f'{script} does not exist'
    if program == 'bash':
        # The launchers: number of processes, then the flags of train.py or test.py.
        count = 1 if 'train' in script else 2
        assert rest.pop(count).isdigit()
        path = path.with_name(path.name.replace('dist_', '').replace('.sh', '.py'))
    found = parse(path, rest)
    options = getattr(found, 'cfg_options', None)
    check_configs(rest, options if isinstance(options, dict) else None)


def test_the_pages_hold_commands():
    # Pages of Python snippets only, which other tests run.
    python = ('own_cell.md', 'extend.md', 'export.md')
    pages = [page for page in PAGES if page.name not in python]
    counts = {page.name: len(commands_of(page)) for page in pages}
    assert counts.pop('baselines.md') >= 4 and all(counts.values())


def test_a_misspelt_setting_is_found():
    cfg = Config.fromfile(ROOT / 'configs/mdeq_tiny_digits.py')
    with pytest.raises(TypeError, match='max_itr'):
        build(cfg.copy(), {'model.backbone.solver.max_itr': 3})
    with pytest.raises(AssertionError):
        build(cfg.copy(), {'train_dataloader.batchsize': 3})


CHEAP = ('tools/dataset_converters/digits.py', 'tools/analysis_tools/get_flops.py')


@pytest.mark.parametrize(
    'command', [c for c in COMMANDS if c.values[0][0] == 'python' and c.values[0][1] in CHEAP]
)
def test_cheap_command_runs(command, tmp_path, monkeypatch, capsys):
    for name in ('tools', 'configs'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', command[1:])
    runpy.run_path(command[1], run_name='__main__')
    assert capsys.readouterr().out


def test_the_figure_of_the_data_flow_is_drawn(tmp_path):
    script = ROOT / 'docs/images/data_flow.py'
    run_python(script, tmp_path / 'a.png')
    assert (tmp_path / 'a.png').stat().st_size > 10_000


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_and_images_exist(page):
    targets = re.findall(r'\]\(([^)\s]+)\)', page.read_text())
    local = [target.split('#')[0] for target in targets if '://' not in target]
    for target in filter(None, local):
        assert (page.parent / target).exists(), target


def test_the_index_says_of_every_page_what_it_is_for():
    index = (ROOT / 'docs/index.rst').read_text()
    told = re.findall(r'^\* :doc:`(\w+)`: (.{20,})$', index, re.MULTILINE)
    pages = [*ROOT.glob('docs/*.md'), ROOT / 'docs/api.rst']
    assert sorted(name for name, _ in told) == sorted(page.stem for page in pages)
    hidden = re.search(r'toctree::\n   :hidden:\n\n((?:   \w+\n)+)', index)
    assert hidden and hidden.group(1).split() == [name for name, _ in told]


@pytest.mark.parametrize(
    'page', [p for p in PAGES if p.parent.name == 'docs'], ids=lambda p: p.name
)
def test_a_page_begins_with_what_one_can_do_after_it(page):
    heading, begin = page.read_text().split('\n\n')[:2]
    assert heading.startswith('# ') and begin.startswith('After this page '), begin


def test_the_readme_lists_every_page():
    readme = (ROOT / 'README.md').read_text()
    for page in ROOT.glob('docs/*.md'):
        assert f'(docs/{page.name})' in readme, page.name


@pytest.mark.parametrize(
    'code',
    [c for page in PAGES for c in fenced(page, 'python') if c.startswith('import mdeq_mm')],
    ids=lambda code: code.splitlines()[0],
)
def test_python_snippet_runs(code, capsys):
    pytest.importorskip('mmpretrain')
    names = {}
    exec(compile(code, 'snippet', 'exec'), names)
    assert 'mdeq_small_imagenet' in capsys.readouterr().out
    assert names['model'].backbone.implicit.solver.max_iter == 30


def run_snippets(page, snippets):
    names = {}
    for code in snippets:
        exec(compile(code, page, 'exec'), names)
    return names


def test_the_example_of_the_readme_runs(capsys):
    (code,) = [c for c in fenced(ROOT / 'README.md', 'python') if c.startswith('import torch')]
    names = run_snippets('README.md', [code])
    assert [tuple(map.shape[1:]) for map in names['features']] == [
        (32, 16, 32),
        (64, 8, 16),
        (128, 4, 8),
        (256, 2, 4),
    ]
    assert_finite(grads(names['backbone'].cell))
    assert "'nfe'" in capsys.readouterr().out


def test_the_readme_names_every_export_of_the_core():
    readme = (ROOT / 'README.md').read_text()
    assert [name for name in mdeq_mm.deq.__all__ if f'`{name}`' not in readme] == []


@pytest.fixture
def registered():
    """Forgets what a page registers: the registries are those of the whole process."""
    registries = (MODELS, TASK_UTILS)
    before = [set(registry.module_dict) for registry in registries]
    yield
    for registry, names in zip(registries, before):
        for name in set(registry.module_dict) - names:
            registry.module_dict.pop(name)


def test_the_parts_of_the_extend_page_train_together(registered):
    snippets = [c for c in fenced(ROOT / 'docs/extend.md', 'python') if not c.startswith('# mm')]
    names = run_snippets('extend.md', snippets)
    backbone = names['backbone']
    assert backbone.implicit.solver == names['Relaxation'](max_iter=12, share=0.5)
    assert_finite(grads(backbone.cell))
    z = backbone.eval().problem(torch.randn(1, 3, 32, 32)).start
    assert z.eq(0).all()


def test_the_export_page_gives_graphs_of_any_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, onnx = fenced(ROOT / 'docs/export.md', 'python')
    names = run_snippets('export.md', [program])
    assert [tuple(map.shape) for map in names['exported']] == [(3, 8, 12, 6), (3, 8, 6, 3)]
    pytest.importorskip('onnxscript')
    # One evaluation of f: graphs of whole solves are those of test_framework.py.
    implicit = names['backbone'].implicit
    implicit.solver = implicit.solver.replace(max_iter=1)
    exec(compile(onnx, 'export.md', 'exec'), names)
    assert (tmp_path / 'mdeq.onnx').stat().st_size > 1000


def test_options_are_read_as_the_shell_gives_them():
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    found = parser.parse_args(['--cfg-options', 'crop_size=(256,512)']).cfg_options
    assert found == dict(crop_size=(256, 512))
