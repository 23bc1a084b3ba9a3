"""OpenMP threads spin for a bounded time, set before torch is loaded, unless the user chose."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mdeq_mm.threads import SPIN_COUNT

ROOT = Path(__file__).resolve().parents[1]
POLICIES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')
# What a program finds once it has imported something.
REPORT = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
HELP = """
import runpy, sys
try:
    runpy.run_path(sys.argv.pop(1), run_name='__main__')
except SystemExit:
    pass
"""


def spin_count(code, *arguments, **policy):
    env = {k: v for k, v in os.environ.items() if k not in POLICIES}
    done = subprocess.run(
        [sys.executable, '-c', f'{code}\n{REPORT}', *map(str, arguments)],
        env={**env, 'PYTHONPATH': str(ROOT), **policy},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_package_bounds_it_before_torch_is_loaded():
    assert spin_count('import mdeq_mm') == str(SPIN_COUNT)
    assert spin_count('import torch, mdeq_mm') == 'None'


@pytest.mark.parametrize('name', POLICIES)
def test_a_policy_of_the_user_stays(name):
    value = dict(OMP_WAIT_POLICY='passive', GOMP_SPINCOUNT='7', KMP_BLOCKTIME='0')[name]
    expected = value if name == 'GOMP_SPINCOUNT' else 'None'
    assert spin_count('import mdeq_mm', **{name: value}) == expected


@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'analysis_tools/inference.py'])
def test_tools_load_the_package_before_torch(tool):
    assert spin_count(HELP, ROOT / 'tools' / tool, '--help') == str(SPIN_COUNT)


@pytest.mark.parametrize('policy, expected', [({}, SPIN_COUNT), (dict(OMP_WAIT_POLICY='x'), '')])
def test_make_bounds_it_by_as_much(policy, expected):
    env = {k: v for k, v in os.environ.items() if k not in POLICIES}
    done = subprocess.run(
        ['make', '--eval', 'spin: ; @echo "spin $$GOMP_SPINCOUNT"', 'spin'],
        cwd=ROOT,
        env={**env, **policy},
        capture_output=True,
        text=True,
    )
    assert re.search(rf'^spin {expected}$', done.stdout, re.MULTILINE), done.stdout + done.stderr
