"""Assertions that say which of several values is wrong, and how."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.testing import assert_close

# Of the versions before 2.14 the suite was run on 2.9. What it cannot do is told where it matters.
OLD_TORCH = digit_version(torch.__version__) < digit_version('2.14')

# Without a driver, torch 2.9 made for CUDA ends the process when a tensor without values is filled
# or normalized as one on a GPU.
needs_fake_cuda = pytest.mark.skipif(
    OLD_TORCH and torch.version.cuda is not None and not torch.cuda.is_available(),
    reason='this torch needs a driver for CUDA tensors without values',
)


def assert_same(got: Any, wanted: Any, name: str = '') -> None:
    """Tensors, or lists or dicts of tensors, are the same numbers of the same dtype."""

    def message(text: str) -> str:
        # It says where, how many and by how much.
        return f'{name}: {text}' if name else text

    assert_close(got, wanted, rtol=0, atol=0, equal_nan=True, msg=message)


def assert_finite(values: Tensor | Mapping[str, Tensor] | Iterable[Tensor]) -> None:
    """No value is infinite or not a number."""
    for name, value in _named(values):
        wrong = ~torch.isfinite(value)
        if wrong.any():
            found = value[wrong].unique().tolist()[:3]
            raise AssertionError(f'{name}: {wrong.sum()} of {value.numel()} are {found}')


def assert_nonzero(values: Tensor | Mapping[str, Tensor] | Iterable[Tensor]) -> None:
    """No tensor is all zeros, or missing."""
    wrong = [name for name, value in _named(values) if value is None or not value.any()]
    if wrong:
        raise AssertionError(f'zero or missing: {", ".join(wrong)}')


def assert_says(error: Any, words: Iterable[str]) -> None:
    """A message, or the error that ``pytest.raises`` caught, holds all these words."""
    text = str(getattr(error, 'value', error))
    missing = [word for word in words if word not in text]
    if missing:
        raise AssertionError(f'{missing} not in: {text}')


def grads(net: nn.Module) -> dict[str, Tensor]:
    """The gradients of a module's parameters by name."""
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def _named(values: Any) -> list[tuple[str, Tensor]]:
    if isinstance(values, Mapping):
        return list(values.items())
    if isinstance(values, Tensor):
        return [('the tensor', values)]
    return [(f'item {index}', value) for index, value in enumerate(values)]
