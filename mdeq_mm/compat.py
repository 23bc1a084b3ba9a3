"""The one module that knows versions: the check of the stack, safe loading, mmengine's look-ups.

Two families of distributions give the same import names: upstream OpenMMLab (``mmengine``,
``mmcv``, ...) and the OneDL forks (``onedl-mmengine``, ``onedl-mmcv``, ...). Whichever is
installed second overwrites the files of the first, so one environment must hold one family only.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
import os
import pickle
import re
import sys
from pathlib import Path
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


def has_operators() -> bool:
    """Whether the installed mmcv holds its compiled operators; it is not imported."""
    spec = importlib.util.find_spec('mmcv')
    folders = spec.submodule_search_locations if spec else None
    return any(next(Path(folder).glob('_ext*'), None) for folder in folders or ())


def operators_command() -> str:
    """The command that builds the installed mmcv once more, with its operators.

    Without ``--no-build-isolation`` the build would not see torch and leave them out silently.
    """
    (package,) = [package for package in PACKAGES if package.module == 'mmcv']
    wanted = package.onedl if package.onedl in installed_of(package) else package.upstream[0]
    return (
        f'pip install "setuptools<81" wheel && MMCV_WITH_OPS=1 pip install --no-build-isolation '
        f'--no-deps --no-cache-dir --force-reinstall --no-binary :all: "{wanted}"'
    )


def _install_command(packages: List[Package], onedl: bool) -> str:
    wanted = [package.onedl if onedl else package.upstream[0] for package in packages]
    return 'pip install ' + ' '.join(f'"{name}"' if '<' in name else name for name in wanted)


class Problem(NamedTuple):
    """What is wrong with the installed stack, and the one command that mends it."""

    what: str
    command: str


def _clash(found: Dict[Package, List[str]]) -> Optional[Problem]:
    """What is doubled or mixed among the installed distributions."""
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
    return Problem(what, f'pip uninstall -y {" ".join(gone)} && {install}')


def find_problem() -> Optional[Problem]:
    """What keeps the installed stack from working, None where nothing does. Imports none of it.

    mmseg and mmpretrain are needed only by configs that name their classes, so their absence is
    no problem here; ``python -m mdeq_mm.check`` lists it.
    """
    found = {package: installed_of(package) for package in PACKAGES}
    clash = _clash(found)
    if clash:
        return clash
    absent = [name for name in ('numpy', 'torch') if not can_import(name)]
    if absent:
        return Problem(f'mdeq_mm needs {" and ".join(absent)}', f'pip install {" ".join(absent)}')
    missing = [package for package in PACKAGES if package.required]
    missing = [package for package in missing if not can_import(package.module)]
    if not missing:
        return None
    names = [name for names in found.values() for name in names]
    # The family already there decides; where there is none, OneDL is the default.
    upstream = any(not name.startswith('onedl-') for name in names)
    # A distribution on record whose files are gone: plain "pip install" would do nothing.
    hollow = [name for package in missing for name in found[package]]
    command = _install_command(missing, onedl=not upstream)
    if hollow:
        command = f'pip uninstall -y {" ".join(hollow)} && {command}'
    modules = ' and '.join(package.module for package in missing)
    return Problem(
        f'mdeq_mm needs {modules}, which cannot be imported here '
        f'(installed: {", ".join(names) or "no OpenMMLab package"})',
        command,
    )


def check_stack() -> None:
    """Check that exactly one OpenMMLab stack is installed. Imports nothing of it.

    Raises:
        ImportError: Something is missing, doubled or mixed; the message names it and gives the
            one command that mends it.
    """
    problem = find_problem()
    if problem:
        raise ImportError(
            'mdeq_mm cannot use this environment (python -m mdeq_mm.check lists it): '
            f'{problem.what}. Mend it with: {problem.command}'
        )


def _is_importable(name: str) -> bool:
    """Stands for mmengine's ``is_installed``, given a module's or a distribution's name."""
    return can_import(_module_of(name)) or installed_version(name) is not None


def _folder_of(name: str) -> str:
    """Stands for mmengine's ``get_installed_path``, given a module's or a distribution's name."""
    module = _module_of(name)
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f'{module} cannot be imported here, or is a namespace package.')
    return os.path.dirname(spec.origin)


def _module_of(name: str) -> str:
    for package in PACKAGES:
        if name in (package.onedl, *map(_distribution_name, package.upstream)):
            return package.module
    return name


def mend_config_lookup() -> None:
    """Let configs inherit from another project's, ``_base_ = ['mmseg::_base_/...']``.

    mmengine asks for that project by the name of upstream's distribution. The forks have other
    names, an editable install's files lie elsewhere than its record, and upstream's mmengine asks
    pkg_resources, which setuptools 82 and later no longer has. The import system answers in each
    case. May be called again.
    """
    from mmengine import utils
    from mmengine.config import config
    from mmengine.utils import package_utils

    # mmengine imports the two functions by name, so each holder of the name is given ours.
    for holder in (package_utils, utils, config):
        holder.is_installed = _is_importable
        holder.get_installed_path = _folder_of


def mend_class_weights() -> None:
    """Let mmseg's cross entropy take class weights where some pixels are ignored.

    Upstream's looks up the weight of the label 255 and fails; with ``avg_non_ignore`` the forks'
    fails as well. The mean is over the weights of the pixels that count. Call it once mmseg is
    imported and before a model is built; without mmseg it does nothing. May be called again.
    """
    module = sys.modules.get('mmseg.models.losses.cross_entropy_loss')
    if module is None or hasattr(module.cross_entropy, '__wrapped__'):
        return
    original = module.cross_entropy

    @functools.wraps(original)
    def cross_entropy(pred, label, *args, **kwargs):
        given = inspect.signature(original).bind(pred, label, *args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        weights = options['class_weight']
        mean = options['reduction'] == 'mean' and options['avg_factor'] is None
        if weights is not None and mean:
            options['avg_factor'] = weights[label[label != options['ignore_index']]].sum()
        return original(*given.args, **given.kwargs)

    module.cross_entropy = cross_entropy


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


def allow_repeated_backward() -> None:
    """Let the backward pass of what is compiled from now on run more than once.

    By itself a compiled graph gives the memory of what it keeps for that pass to the pass. torch
    has no switch for one graph alone.
    """
    import torch._functorch.config as config

    config.donated_buffer = False


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
