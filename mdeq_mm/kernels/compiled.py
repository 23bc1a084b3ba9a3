"""The formulas of the operations through torch.compile: Triton on a GPU, C++ on a CPU."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import formulas


def __getattr__(name: str) -> Callable[..., Any]:
    """The operation ``name``, as ``torch.ops.mdeq_mm`` has it."""
    if name.startswith('_') or not hasattr(formulas, name):
        raise AttributeError(f'there is no operation {name!r}')
    return functools.partial(_run, name)


def _run(name: str, *args: Any) -> Any:
    formula = getattr(formulas, name)
    if torch.compiler.is_compiling():
        # Inside a graph that is being compiled.
        return formula(*args)
    first = args[0]
    key = tuple(_static(value) for value in args)
    return _compiled(name, first.device.type, first.shape[1], key)(*args)


def _static(value: Any) -> Any:
    """The part of an argument that a program is compiled for: all but tensors' sizes and values."""
    if isinstance(value, Tensor):
        return value.dtype
    return tuple(_static(v) for v in value) if isinstance(value, (list, tuple)) else value


@functools.cache
def _compiled(name: str, *key: Any) -> Callable[..., Any]:
    """A program for one kind of call, identified by ``key``."""
    formula = getattr(formulas, name)
    # torch counts recompilations per code object and gives up after eight, which the norms of one
    # network can exceed. It also treats values that differed under one name as variable. Each
    # program gets its own code object and name, so that only the sizes of maps vary.
    own = f'{name}_{hash(key) & 0xFFFFFFFF:08x}'
    code = formula.__code__.replace(co_name=own)
    return torch.compile(FunctionType(code, formula.__globals__, own))
