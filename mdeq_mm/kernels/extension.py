"""Builds the C++ operations once per kind of machine and loads them."""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from ..deq.solvers.products import register_products
from .products import CppProducts

_LOG = logging.getLogger('mdeq_mm')
_SOURCES = Path(__file__).parent / 'csrc'
# No -ffast-math: a solver checks for NaN. OpenMP is the one that torch has loaded: a second one
# would start its own threads.
_FLAGS = (
    '-O2 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fvisibility=hidden '
    '-Wno-psabi -Wno-ignored-attributes'
).split()
_lock = threading.Lock()


def load() -> str | None:
    """Load the operations as ``torch.ops.mdeq_mm``, and build them first if necessary.

    A build takes about a minute and is announced by one line. It is kept in
    ``TORCH_EXTENSIONS_DIR``, by default ``~/.cache/torch_extensions``.

    Returns:
        str | None: Why there are none; None if they are loaded. The answer is cached.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> str | None:
    reason = _obstacle()
    if reason is None:
        try:
            _load_or_build()
        except (ImportError, OSError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f'the build failed: {_first_error(lines)}'
    if reason is not None:
        _LOG.warning(
            'f runs on torch operators, without the C++ operations of mdeq_mm.kernels: %s', reason
        )
    return reason


def _first_error(lines: list[str]) -> str:
    """The most informative line of a compiler's output."""
    errors = [line for line in lines if 'error:' in line]
    return (errors or lines)[0].strip()


def _obstacle() -> str | None:
    """Why this machine cannot build or load them; None if it can."""
    if sys.platform == 'win32':
        return 'they need GCC or Clang, which torch does not use on Windows.'
    if _library().is_file():
        return None
    compiler = shlex.split(os.environ.get('CXX', 'c++'))[0]
    if shutil.which(compiler) is None:
        return f'no C++ compiler {compiler!r} was found. Install one (g++), or set CXX.'
    if shutil.which('ninja') is None and importlib.util.find_spec('ninja') is None:
        return 'torch builds extensions with ninja, which was not found: pip install ninja.'
    return None


def _load_or_build() -> None:
    library = _library()
    if library.is_file():
        torch.ops.load_library(library)
    else:
        with _folder(library) as folder, _one_process(folder):
            if library.is_file():
                torch.ops.load_library(library)
            else:
                _build(folder)
    _register_shapes()
    register_products('cpu', CppProducts())


def _library() -> Path:
    """The folder of the build for this torch and this processor."""
    name = f'mdeq_mm_kernels_{_fingerprint()}'
    root = os.environ.get('TORCH_EXTENSIONS_DIR')
    if not root:
        root = os.environ.get('XDG_CACHE_HOME') or Path('~', '.cache')
        root = Path(root, 'torch_extensions')
    # For a user without a home this path cannot be created, as in a folder without permission.
    with contextlib.suppress(RuntimeError):
        return Path(root).expanduser() / name / f'{name}.so'
    return Path(os.devnull) / name / f'{name}.so'


@functools.cache
def _fingerprint() -> str:
    """Differs between machines that cannot share a build: a home directory may serve many."""
    parts = [torch.__version__, platform.machine(), _processor(), *_FLAGS]
    parts += [path.read_text() for path in sorted(_SOURCES.iterdir())]
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The instruction sets that -march=native builds for."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.lower().startswith(('flags', 'features')):
                return ' '.join(sorted(line.partition(':')[2].split()))
    return platform.processor()


@contextlib.contextmanager
def _folder(library: Path) -> Iterator[Path]:
    """The folder of the library, or a temporary one if it is not writable."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=library.parent).close()
    except OSError:
        with tempfile.TemporaryDirectory(prefix='mdeq_mm_kernels_') as folder:
            yield Path(folder)
    else:
        yield library.parent


@contextlib.contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Hold a lock that is released with its process, so that one process builds for all."""
    import fcntl

    with open(folder / 'lock', 'w') as file:
        # Without locks, as on some network drives, each process builds; the last result stays.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path) -> None:
    _LOG.warning(
        'Building the C++ operations of f into %s: about a minute, once on this machine. '
        "norm_kernel='native' avoids it.",
        folder,
    )
    from torch.utils import cpp_extension

    # Built elsewhere first: an interrupted build leaves nothing that looks complete.
    with tempfile.TemporaryDirectory(dir=folder) as scratch, _ninja_on_path():
        name = folder.name
        cpp_extension.load(
            name,
            [str(path) for path in sorted(_SOURCES.glob('*.cpp'))],
            extra_cflags=_FLAGS,
            build_directory=scratch,
            with_cuda=False,
            is_python_module=False,
        )
        os.replace(Path(scratch) / f'{name}.so', folder / f'{name}.so')


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch find a pip-installed ninja even if its environment is not activated."""
    if shutil.which('ninja') is not None:
        yield
        return
    import ninja

    before = os.environ.get('PATH', '')
    os.environ['PATH'] = os.pathsep.join([before, ninja.BIN_DIR])
    try:
        yield
    finally:
        os.environ['PATH'] = before


def _register_shapes() -> None:
    """Tell torch.compile what the operations return, without running them."""
    from . import shapes

    for name, function in shapes.ALL.items():
        torch.library.register_fake(f'mdeq_mm::{name}', function)
