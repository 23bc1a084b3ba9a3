"""Which implementation computes an operation."""

from typing import Any

import torch
from torch import Tensor

from ..deq.solvers.products import in_transform
from ..options import check_choice
from . import compiled, extension

#: Choices of ``kernel``. ``'cpp'``: C++, on CPUs. ``'compiled'``: formulas through torch.compile.
#: ``'native'``: torch's operators. ``'auto'``: C++ on a CPU that has a compiler, native elsewhere.
KERNELS = ('auto', 'native', 'cpp', 'compiled')

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def resolve(kernel: str, device: torch.device | str) -> str:
    """The implementation that ``kernel`` means on a device: ``'native'``, ``'cpp'`` or
    ``'compiled'``.

    The C++ operations are built here if necessary. If they cannot be built, and for tensors that
    are not on a CPU, torch's operators are used instead.
    """
    check_choice('mdeq_mm.kernels', 'kernel', kernel, KERNELS)
    return _resolved(kernel, torch.device(device).type)


# A constant for torch.compile, which cannot trace a build.
@torch.compiler.assume_constant_result
def _resolved(kernel: str, device: str) -> str:
    if kernel in ('native', 'compiled'):
        return kernel
    return 'cpp' if device == 'cpu' and extension.load() is None else 'native'


def chosen(kernel: str, x: Tensor, *others: Tensor | None) -> str:
    """The implementation for maps ``x`` (N, C, H, W) and other tensors.

    Torch's operators are used where the others cannot be: other dtypes, tensors without pixels or
    values, tensor subclasses, exported graphs, and the transforms of torch.func.
    """
    found = _resolved(kernel, x.device.type)
    if found == 'native' or torch.jit.is_tracing():
        return 'native'
    if x.dim() != 4 or x.dtype not in _DTYPES or x.numel() == 0:
        return 'native'
    if torch.compiler.is_compiling():
        return 'native' if _exporting() else found
    plain = all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in (x, *others))
    return found if plain and not _transformed() else 'native'


def _exporting() -> bool:
    # torch before 2.7 lacks this function; its exports contain the operations.
    return getattr(torch.compiler, 'is_exporting', lambda: False)()


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active, which custom operators lack."""
    return in_transform() or torch.autograd.forward_ad._current_level >= 0


def operations(kernel: str) -> Any:
    """The operations of a resolved kernel: an object with a function for each."""
    return torch.ops.mdeq_mm if kernel == 'cpp' else compiled


def differentiates() -> bool:
    """In a backward pass: whether its result can be differentiated again.

    A compiled backward pass never is.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def as_map(x: Tensor, like: Tensor, kernel: str) -> Tensor:
    """``x`` in the dtype of ``like``, and for C++ with channels last in memory."""
    x = x.to(like.dtype)
    return x.contiguous(memory_format=torch.channels_last) if kernel == 'cpp' else x
