"""What --help of every tool says: a text for each option, and its default."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
SCRIPTS = [
    path
    for path in sorted(TOOLS.rglob('*.py'))
    if 'ArgumentParser(' in path.read_text() and not path.name.startswith('_')
]


class Found(Exception):
    """Raised to get the parser out of a script."""


@pytest.fixture
def parser_of(monkeypatch):
    """Give a function that runs a script up to its parser."""

    def stop(self, *args, **kwargs):
        raise Found(self)

    def run(path):
        with monkeypatch.context() as patch, pytest.raises(Found) as found:
            patch.setattr(sys, 'argv', [str(path)])
            patch.setattr(argparse.ArgumentParser, 'parse_args', stop)
            patch.syspath_prepend(str(path.parent))
            runpy.run_path(str(path), run_name='__main__')
        return found.value.args[0]

    return run


def test_there_are_tools():
    assert len(SCRIPTS) >= 12


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.stem)
def test_every_option_has_a_text_and_shows_its_default(path, parser_of):
    parser = parser_of(path)
    assert parser.description
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        name = '/'.join(action.option_strings) or action.dest
        assert action.help, f'{name} has no help'
        if action.default in (None, False, argparse.SUPPRESS) or action.default == []:
            continue
        text = parser._get_formatter()._expand_help(action)
        shown = action.default
        values = shown if isinstance(shown, (list, tuple)) else [shown]
        assert 'default' in text and all(str(v) in text for v in values), f'{name}: {text}'
