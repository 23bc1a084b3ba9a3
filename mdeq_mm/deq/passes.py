"""What belongs to one forward pass: f must be the same function at every call of it."""

import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_local = threading.local()


class Pass:
    """One forward pass of an implicit layer.

    Attributes:
        values (dict): What modules of f keep for the pass, each under its own key.
    """

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}


@contextmanager
def forward_pass() -> Iterator[Pass]:
    """The pass that this thread is in, or a new one. A layer inside another's f joins its pass."""
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


def bound_function(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` for the calls of one forward pass, with its module :func:`bound` where it shows.

    Args:
        f: A module, a method of one, or ``functools.partial`` of either. Any other function is
            returned unchanged, because the modules it calls cannot be known.
    """
    if isinstance(f, nn.Module):
        return bound(f)
    if isinstance(f, functools.partial):
        return functools.partial(bound_function(f.func), *f.args, **f.keywords)
    if isinstance(f, MethodType) and isinstance(f.__self__, nn.Module):
        return MethodType(f.__func__, bound(f.__self__))
    return f


def bound(module: nn.Module) -> nn.Module:
    """``module`` for the calls of one forward pass.

    The result shares parameters, buffers and hooks with ``module``, but is a tree of objects of
    its own. Weights that torch computes from other tensors (weight norm, spectral norm, orthogonal
    and other parametrizations) are computed here, once, with their graph. Nothing is global:
    passes, threads and nested equilibria share no weights.

    A value that a module assigns to itself in ``forward`` is lost with the copy; buffers that it
    changes in place keep the change. A module that keeps something for the duration of a pass has a
    method ``begin_pass(current)``, which is called on its copy with this thread's pass, or None.

    Args:
        module (nn.Module): Any module, also one that ``torch.compile`` returned. Scripted
            submodules are used as they are, and so are submodules that FSDP shards, whose weights
            exist only during their calls, and what ``module.compile()`` compiled in place.
    """
    return _copy(module, {})


def _copy(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, torch.jit.ScriptModule) or is_sharded(module):
        return module
    copy = object.__new__(type(module))
    made[id(module)] = copy
    values: dict[str, Any] = dict(module.__dict__)
    if parametrize.is_parametrized(module):
        # torch makes a subclass whose properties compute the weights. The copy has the class below
        # it and holds the weights as plain values. The parametrizations are called directly: a
        # cache opened by ``parametrize.cached()`` may hold weights of another grad mode or thread.
        copy.__class__ = type(module).__mro__[1]
        values.update((name, weight()) for name, weight in module.parametrizations.items())
    values['_modules'] = {
        name: child if child is None else _copy(child, made)
        for name, child in module._modules.items()
        if name != 'parametrizations'
    }
    copy.__dict__.update(values)
    if is_compiled(copy):
        # Its call is compiled around the module that it wraps: now the copy of that.
        copy.__setstate__(copy.__getstate__())
    _run_weight_hooks(copy)
    if hasattr(type(copy), 'begin_pass'):
        copy.begin_pass(current_pass())
    return copy


def _run_weight_hooks(copy: nn.Module) -> None:
    """Compute the weights that torch's older norms set in a hook before each call."""
    hooks = copy._forward_pre_hooks
    weights = [key for key, hook in hooks.items() if isinstance(hook, (SpectralNorm, WeightNorm))]
    if not weights:
        return
    for key in weights:
        hooks[key](copy, None)
    others = ((key, hook) for key, hook in hooks.items() if key not in weights)
    copy._forward_pre_hooks = OrderedDict(others)


def is_compiled(module: nn.Module) -> bool:
    """Whether this is what ``torch.compile`` makes of a module."""
    dynamo = sys.modules.get('torch._dynamo')
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, in either of its forms, shards this module itself."""
    fsdp = sys.modules.get('torch.distributed.fsdp')
    names = ('FullyShardedDataParallel', 'FSDPModule')
    return isinstance(module, tuple(getattr(fsdp, name) for name in names if hasattr(fsdp, name)))
