"""What belongs to one forward pass: f must be the same function at every call of it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

_local = threading.local()


class Pass:
    """One forward pass of an implicit layer.

    Attributes:
        values (dict): What modules of f keep for the pass, by keys of their own.
    """

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}


@contextmanager
def forward_pass() -> Iterator[Pass]:
    """The pass that this thread is in, or a new one: a layer inside f of another is part of it."""
    current = current_pass()
    if current is not None:
        yield current
        return
    _local.current = Pass()
    try:
        yield _local.current
    finally:
        _local.current = None


def current_pass() -> Pass | None:
    """The pass that this thread is in."""
    return getattr(_local, 'current', None)


def bound(module: nn.Module) -> nn.Module:
    """``module`` for the calls of one forward pass.

    The result shares parameters, buffers and hooks with ``module``, but is a tree of objects of
    its own: weights that a parametrization computes (weight norm, spectral norm, orthogonality)
    are computed here, once, with their graph. Nothing of it is global: passes, threads and nested
    equilibria do not meet.

    A value that a module assigns to itself in ``forward`` stays with the copy and is lost with
    it; buffers that it changes in place are not.

    Args:
        module (nn.Module): Anything; submodules that are scripted are taken as they are.
    """
    return _copy(module, {})


def _copy(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    copy = object.__new__(type(module))
    made[id(module)] = copy
    values: dict[str, Any] = dict(module.__dict__)
    if parametrize.is_parametrized(module):
        # torch makes a subclass whose properties compute the weights: the copy is of the class
        # below it and holds them as plain values.
        copy.__class__ = type(module).__mro__[1]
        values.update((name, getattr(module, name)) for name in module.parametrizations)
    values['_modules'] = {
        name: child if child is None else _copy(child, made)
        for name, child in module._modules.items()
        if name != 'parametrizations'
    }
    copy.__dict__.update(values)
    return copy
