"""What glibc does with memory that this process frees. Imports no torch."""

import ctypes
import os
import platform
from typing import Any

# Parameters of mallopt(3), as glibc's malloc.h numbers them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_THRESHOLD = 2**30
# Any of these in GLIBC_TUNABLES, or a variable MALLOC_..., is the user's own choice.
_TUNABLES = ('mmap_max', 'mmap_threshold', 'top_pad', 'trim_threshold')


def keep_freed_memory() -> bool:
    """Let this process keep large blocks that it frees, for the next ones that it asks for.

    Every call of f frees maps of many megabytes, and the next call asks for as much. By default
    glibc gives them back in between, and the system has to fill each page with zeros again. What
    is kept goes back when the process ends.

    It concerns the whole process, so that programs call it and modules do not. Nothing happens
    where glibc does not allocate, or where the environment says how it should.

    Returns:
        bool: Whether glibc keeps them from now on.
    """
    if platform.libc_ver()[0] != 'glibc' or _user_chose():
        return False
    try:
        libc, first = ctypes.CDLL('libc.so.6'), ctypes.CDLL(None)
        if _address(first.malloc) != _address(libc.malloc):
            # Another allocator is loaded before glibc's.
            return False
        done = [libc.mallopt(name, _THRESHOLD) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    except (OSError, AttributeError):
        return False
    return all(done)


def _user_chose() -> bool:
    tunables = os.environ.get('GLIBC_TUNABLES', '')
    return any(name.startswith('MALLOC_') for name in os.environ) or any(
        f'glibc.malloc.{name}=' in tunables for name in _TUNABLES
    )


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
