"""Checkpoints are plain data: loading one never runs code from the file."""

import os
import pickle
import re
from collections.abc import Callable
from typing import Any


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint names a Python object that loading would have to run."""


def _history_method(owner: Any, name: str) -> Callable:
    """Replaces ``getattr`` while a checkpoint is loaded: returns methods of HistoryBuffer only.

    mmengine's log history pickles its statistics as ``getattr(HistoryBuffer, 'mean')``. The real
    ``getattr`` would give a hostile file every attribute of every object it can name.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is not HistoryBuffer or not isinstance(name, str) or name.startswith('_'):
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr was used on {owner!r}, {name!r}.')
    return getattr(HistoryBuffer, name)


def _mm_globals() -> list[tuple[Any, str]]:
    """What a checkpoint of mmengine's Runner names beyond torch's own allow list, as (object,
    name).

    Names are given explicitly: pickles of numpy 1 say ``numpy.core``, those of numpy 2
    ``numpy._core``, and both must load under both. Also, mmengine allows some of the same objects
    during its own loads and removes them afterwards; a pair is a separate entry and stays.
    """
    import numpy as np
    from mmengine.logging.history_buffer import HistoryBuffer

    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray

    allowed: list[tuple[Any, str]] = [
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

    Applies to the whole process and may be called again. Each entry builds plain data: none of them
    can run code from a file.
    """
    import torch

    torch.serialization.add_safe_globals(_mm_globals())


def force_safe_loading() -> None:
    """Make every ``torch.load`` of this process, mmengine's too, refuse what is not plain data.

    When torch refuses a file, mmengine's loader (OneDL) loads it again without protection. This
    prevents it, also for files that :func:`verify_checkpoint` has not seen, such as those of
    ``init_cfg=dict(type='Pretrained', ...)`` and those loaded by URL. For programs, not libraries:
    it sets ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` for this process and its children.
    """
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    allow_mm_globals()


def verify_checkpoint(path: str) -> dict:
    """Load a checkpoint as plain data onto the CPU, or refuse it.

    Call it on any file from outside before mmengine loads it: mmengine's own loader may fall back
    to running code from the file.

    Args:
        path: A local file saved by torch.

    Returns:
        The dict the file holds.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: The file names a Python object that is not plain data. Nothing in it
            was run.
        ValueError: The file is not a checkpoint, or holds something other than a dict.
    """
    import torch

    if not os.path.isfile(path):
        raise FileNotFoundError(f'There is no checkpoint {path!r}: give the path of a local file.')
    allow_mm_globals()
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        # A name that is not allowed, or an allowed function's call for a class that is not.
        named = re.search(r"GLOBAL (\S+)|got <class '(\S+)'>", str(error))
        if not named:
            raise ValueError(f'{path!r} is not a checkpoint torch can read: {error}') from error
        raise UnsafeCheckpointError(
            f'{path!r} was refused: it names {named[1] or named[2]}, which is not plain data and '
            'could run code. Nothing in the file was run. If you trust where it comes from, save '
            'its weights alone there, torch.save(dict(state_dict=model.state_dict()), path), and '
            'use that file.'
        ) from None
    except Exception as error:  # torch's errors for damaged files have no common base class
        raise ValueError(
            f'{path!r} is not a checkpoint torch can read ({type(error).__name__}: {error}). '
            'Is the file whole, and saved by torch.save?'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path!r} holds a {type(checkpoint).__name__}, a checkpoint is a dict.')
    return checkpoint
