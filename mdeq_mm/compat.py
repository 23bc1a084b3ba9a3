"""The one module that knows versions: the check of the installed stack, and safe loading.

Two families of distributions give the same import names: upstream OpenMMLab (``mmengine``,
``mmcv``, ...) and the OneDL forks (``onedl-mmengine``, ``onedl-mmcv``, ...). Whichever is
installed second overwrites the files of the first, so one environment must hold one family only.
"""

import importlib.metadata
import importlib.util
import os
import pickle
import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple


class Package(NamedTuple):
    """An OpenMMLab import name and the distributions that can provide it."""

    module: str
    onedl: str
    # The first is the one to install, given as a requirement; the others are variants of it.
    upstream: Tuple[str, ...]
    required: bool


PACKAGES = (
    Package('mmengine', 'onedl-mmengine', ('mmengine', 'mmengine-lite'), True),
    Package('mmcv', 'onedl-mmcv', ('mmcv<2.2', 'mmcv-lite', 'mmcv-full'), True),
    Package('mmseg', 'onedl-mmsegmentation', ('mmsegmentation',), False),
    Package('mmpretrain', 'onedl-mmpretrain', ('mmpretrain',), False),
    Package('mmdet', 'onedl-mmdetection', ('mmdet',), False),
)


def _distribution_name(requirement: str) -> str:
    return re.split(r'[<>=!~ ]', requirement, maxsplit=1)[0]


def installed_version(distribution: str) -> Optional[str]:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_of(package: Package) -> List[str]:
    """The installed distributions that provide ``package.module``; more than one is a clash."""
    names = (package.onedl, *map(_distribution_name, package.upstream))
    return [name for name in names if installed_version(name) is not None]


def can_import(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


def _install_command(packages: List[Package], onedl: bool) -> str:
    wanted = [package.onedl if onedl else package.upstream[0] for package in packages]
    return 'pip install ' + ' '.join(f'"{name}"' if '<' in name else name for name in wanted)


def _clash(found: Dict[Package, List[str]]) -> Optional[str]:
    """What is doubled or mixed among the installed distributions, and the command that mends it."""
    doubled = [names for names in found.values() if len(names) > 1]
    everything = [name for names in found.values() for name in names]
    onedl = [name for name in everything if name.startswith('onedl-')]
    upstream = [name for name in everything if not name.startswith('onedl-')]
    if doubled:
        what = '; '.join(f'{" and ".join(names)} overwrite each other' for names in doubled)
    elif onedl and upstream:
        what = (
            f'{", ".join(onedl)} (OneDL) and {", ".join(upstream)} (upstream OpenMMLab) '
            'are two families that do not work together'
        )
    else:
        return None
    # Both of two that share files go and one comes back: removing one takes files of the other.
    wrong = {p: n for p, n in found.items() if len(n) > 1 or (onedl and set(n) & set(upstream))}
    gone = [name for names in wrong.values() for name in names]
    install = _install_command(list(wrong), onedl=bool(onedl))
    command = f'pip uninstall -y {" ".join(gone)} && {install}'
    return f'{what}. Mend it with: {command}'


def check_stack() -> None:
    """Check that exactly one OpenMMLab stack is installed. Imports nothing of it.

    mmseg and mmpretrain are needed only by configs that name their classes, so their absence is
    no error here; ``python -m mdeq_mm.check`` lists it.

    Raises:
        ImportError: Something is missing, doubled or mixed; the message names it and gives the
            one command that mends it.
    """
    found = {package: installed_of(package) for package in PACKAGES}
    clash = _clash(found)
    if clash:
        raise ImportError(f'mdeq_mm cannot use this environment: {clash}')
    missing = [package for package in PACKAGES if package.required]
    missing = [package for package in missing if not can_import(package.module)]
    if not missing:
        return
    names = [name for names in found.values() for name in names]
    # The family already there decides; where there is none, OneDL is the default.
    upstream = any(not name.startswith('onedl-') for name in names)
    # A distribution on record whose files are gone: plain "pip install" would do nothing.
    hollow = [name for package in missing for name in found[package]]
    command = _install_command(missing, onedl=not upstream)
    if hollow:
        command = f'pip uninstall -y {" ".join(hollow)} && {command}'
    modules = ' and '.join(package.module for package in missing)
    raise ImportError(
        f'mdeq_mm needs {modules}, which cannot be imported here '
        f'(installed: {", ".join(names) or "no OpenMMLab package"}). Mend it with: {command}'
    )


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint names a Python object that loading it would have to run."""


def _history_method(owner: Any, name: str) -> Callable:
    """Stands for ``getattr`` while a checkpoint is loaded: a method of HistoryBuffer, nothing else.

    mmengine's log history pickles its statistics as ``getattr(HistoryBuffer, 'mean')``. The real
    ``getattr`` would hand a hostile file every attribute of every object it can name.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is not HistoryBuffer or not isinstance(name, str) or name.startswith('_'):
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr was used on {owner!r}, {name!r}.')
    return getattr(HistoryBuffer, name)


def _mm_globals() -> List[Tuple[Any, str]]:
    """What a checkpoint of mmengine's Runner names beyond torch's own list, as (object, name).

    Names are given explicitly: numpy 1 pickles say ``numpy.core``, those of numpy 2
    ``numpy._core``, and either must load under either. Also, mmengine allows some of the same
    objects by themselves for the time of its own loads and removes them after; a pair is another
    entry and stays.
    """
    import numpy as np
    from mmengine.logging.history_buffer import HistoryBuffer

    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray

    allowed: List[Tuple[Any, str]] = [
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (_history_method, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
    ]
    for core in ('numpy.core', 'numpy._core'):
        allowed.append((multiarray._reconstruct, f'{core}.multiarray._reconstruct'))
        allowed.append((multiarray.scalar, f'{core}.multiarray.scalar'))
    # Numbers and booleans only: object arrays hold pickles of anything.
    for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?':
        kind = type(np.dtype(code))
        allowed.append((kind, f'{kind.__module__}.{kind.__qualname__}'))
    return allowed


def allow_mm_globals() -> None:
    """Let ``torch.load(weights_only=True)`` read what mmengine saves: log history, numpy numbers.

    Holds for the whole process and may be called again. Each entry builds plain data: none of
    them can run code that a file brings.
    """
    import torch

    torch.serialization.add_safe_globals(_mm_globals())


def force_safe_loading() -> None:
    """Make every ``torch.load`` of this process, mmengine's too, refuse what is not plain data.

    mmengine's loader (OneDL) answers a refused file by loading it again without protection. This
    closes that way for files that :func:`verify_checkpoint` has not seen, such as those of
    ``init_cfg=dict(type='Pretrained', ...)`` and those loaded by URL. For programs, not libraries:
    it sets ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` for this process and its children.
    """
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    allow_mm_globals()


def verify_checkpoint(path: str) -> dict:
    """Load a checkpoint as plain data onto the CPU, or refuse it.

    Call it on any file that comes from outside before mmengine loads it: mmengine's own loader
    may fall back to running what the file says.

    Args:
        path: A local file saved by torch.

    Returns:
        The dict the file holds.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: The file names a Python object that is no plain data. Nothing in it
            was run.
        ValueError: The file is no checkpoint, or holds something else than a dict.
    """
    import torch

    if not os.path.isfile(path):
        raise FileNotFoundError(f'There is no checkpoint {path!r}: give the path of a local file.')
    allow_mm_globals()
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r'GLOBAL (\S+)', str(error))
        if not named:
            raise ValueError(f'{path!r} is not a checkpoint torch can read: {error}') from error
        raise UnsafeCheckpointError(
            f'{path!r} was refused: it names {named.group(1)}, which is not plain data and could '
            'run code. Nothing in the file was run. If you trust where it comes from, save its '
            'weights alone there, torch.save(dict(state_dict=model.state_dict()), path), and use '
            'that file.'
        ) from None
    except Exception as error:  # what torch raises on a damaged file has no common base
        raise ValueError(
            f'{path!r} is not a checkpoint torch can read ({type(error).__name__}: {error}). '
            'Is the file whole, and saved by torch.save?'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path!r} holds a {type(checkpoint).__name__}, a checkpoint is a dict.')
    return checkpoint
