"""What a program sets for its process before it computes, unless the user chose."""

import os
import platform
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from mdeq_mm.threads import SPIN_COUNT

from .processes import run, run_python

ROOT = Path(__file__).resolve().parents[1]
POLICIES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')
ALLOCATION, THREADS = ROOT / 'mdeq_mm/allocation.py', ROOT / 'mdeq_mm/threads.py'
needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc', reason='only glibc is told to keep what is freed'
)
# What a program finds once it has done something: how long threads spin, and whether a large block
# that is freed stays with the process.
REPORT = """
import ctypes, os
class Counts(ctypes.Structure):
    _fields_ = [(f'field{i}', ctypes.c_int) for i in range(10)]
held = None
if hasattr(libc := ctypes.CDLL(None), 'mallinfo'):
    libc.mallinfo.restype = Counts
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    # The first field: bytes of the heap, without blocks that have a mapping of their own.
    before = libc.mallinfo().field0
    libc.free(libc.malloc(2**28))
    held = libc.mallinfo().field0 - before > 2**27
print(os.environ.get('GOMP_SPINCOUNT'), held)
"""
# A script until it loads torch: how long threads of this process will spin.
UNTIL_TORCH = """
import os, runpy, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == 'torch':
            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Stop())
tool = sys.argv.pop(1)
sys.path.insert(0, os.path.dirname(tool))
runpy.run_path(tool, run_name='__main__')
"""
# Without the package, and so without torch.
KEEP = f"""
import runpy
print(runpy.run_path({str(ALLOCATION)!r})['keep_freed_memory']())
"""
BOUND = f"""
import runpy
runpy.run_path({str(THREADS)!r})['bound_spinning']()
"""


def report(code, *arguments, **env):
    """What REPORT and, before it, ``code`` printed last, as words."""
    chosen = ('GLIBC_TUNABLES', 'LD_PRELOAD', *POLICIES)
    for name in os.environ:
        if name in chosen or name.startswith('MALLOC_'):
            env.setdefault(name, None)
    done = run_python('-c', f'{code}\n{REPORT}', *arguments, env={'PYTHONPATH': str(ROOT), **env})
    return ' '.join(done.stdout.splitlines()[-2:]).split()


@needs_glibc
def test_the_package_bounds_spinning_before_torch_is_loaded_and_leaves_memory_alone():
    assert report('import mdeq_mm') == [str(SPIN_COUNT), 'False']
    loaded = 'import sys; sys.modules["torch"] = sys'
    assert report(f'{loaded}\n{BOUND}')[0] == 'None'


@pytest.mark.parametrize('name', POLICIES)
def test_a_policy_of_the_user_stays(name):
    value = dict(OMP_WAIT_POLICY='passive', GOMP_SPINCOUNT='7', KMP_BLOCKTIME='0')[name]
    expected = value if name == 'GOMP_SPINCOUNT' else 'None'
    assert report(BOUND)[0] == str(SPIN_COUNT)
    assert report(BOUND, **{name: value})[0] == expected


TOOLS = {
    'train.py': True,
    'test.py': True,
    'demo.py': True,
    'benchmarks/run.py': True,
    'analysis_tools/inference.py': False,
    'analysis_tools/get_flops.py': False,
}


@pytest.mark.parametrize('tool', TOOLS)
def test_tools_load_the_package_before_torch(tool):
    unset = dict.fromkeys(POLICIES)
    done = run_python('-c', UNTIL_TORCH, ROOT / 'tools' / tool, '--help', env=unset)
    assert done.stdout.split() == [str(SPIN_COUNT)]


@pytest.mark.parametrize('tool', TOOLS)
def test_tools_that_compute_long_keep_memory(tool, monkeypatch):
    path, kept = ROOT / 'tools' / tool, []
    monkeypatch.setattr('mdeq_mm.allocation.keep_freed_memory', lambda: kept.append(True))
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, 'argv', [str(path), '--help'])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name='__main__')
    assert kept == [True] * TOOLS[tool]


# Pages of another size, which the docs recommend, are no choice of what is kept.
OTHER_CHOICES = dict(GLIBC_TUNABLES='glibc.malloc.hugetlb=1')
CHOICES = [
    dict(MALLOC_TRIM_THRESHOLD_='131072'),
    dict(MALLOC_ARENA_MAX='1'),
    dict(GLIBC_TUNABLES='glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=65536'),
]


@needs_glibc
@pytest.mark.parametrize('env', [{}, OTHER_CHOICES])
def test_a_process_keeps_what_it_frees(env):
    assert report(KEEP, **env) == ['True', 'None', 'True']


@needs_glibc
@pytest.mark.parametrize('env', CHOICES, ids=lambda env: '-'.join(env))
def test_an_allocation_that_the_user_set_up_stays(env):
    assert report(KEEP, **env) == ['False', 'None', 'False']


@needs_glibc
@pytest.mark.skipif(not shutil.which('cc'), reason='needs a C compiler')
def test_another_allocator_is_left_alone(tmp_path):
    source, library = tmp_path / 'other.c', tmp_path / 'other.so'
    source.write_text(
        '#include <stddef.h>\n'
        'void *__libc_malloc(size_t size);\n'
        'void *malloc(size_t size) { return __libc_malloc(size); }\n'
    )
    run(['cc', '-shared', '-fPIC', source, '-o', library])
    assert report(KEEP, LD_PRELOAD=str(library)) == ['False', 'None', 'False']


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, 'libc_ver', lambda: ('', ''))
    assert runpy.run_path(str(ALLOCATION))['keep_freed_memory']() is False


@pytest.mark.parametrize('policy, expected', [({}, SPIN_COUNT), (dict(OMP_WAIT_POLICY='x'), '')])
def test_make_bounds_it_by_as_much(policy, expected):
    command = ['make', '--eval', 'spin: ; @echo "spin $$GOMP_SPINCOUNT"', 'spin']
    done = run(command, cwd=ROOT, env={**dict.fromkeys(POLICIES), **policy})
    assert re.search(rf'^spin {expected}$', done.stdout, re.MULTILINE)
