"""Checks of what a user wrote: an error names the value, the valid choices and the remedy."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar('T', bound=type)

_INHERITED = (
    " Where a config's _base_ gives it to the part that stood here, _delete_=True beside type "
    'drops what is inherited.'
)


def closest(name: str, choices: Iterable[str]) -> str:
    """A ``did you mean`` hint for a misspelt name, empty where nothing is near."""
    near = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.7)
    return f' Did you mean {near[0]!r}?' if near else ''


def checks_options(cls: T) -> T:
    """Class decorator: an unknown keyword lists the options the class does take.

    ``cls.option_remedies`` says, for keywords that others put there, what to do instead.
    """
    init = cls.__init__
    valid = [name for name in inspect.signature(init).parameters if name != 'self']

    @functools.wraps(init)
    def checked(self, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in valid:
                remedies = getattr(cls, 'option_remedies', {})
                hint = remedies.get(name) or closest(name, valid) or _INHERITED
                raise TypeError(
                    f'{cls.__name__} has no option {name!r}.{hint} '
                    f'Its options are: {", ".join(valid)}.'
                )
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


def immutable(cls: T) -> T:
    """Class decorator: a frozen dataclass that checks its options; assignment raises an error."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    cls.__setattr__ = _refuse_change
    return checks_options(cls)


def _refuse_change(self: Any, name: str, value: Any) -> None:
    raise AttributeError(
        f'{type(self).__name__} cannot be changed. Make a new one by '
        f'replace({name}={value!r}) and use that instead.'
    )


def check_int(owner: str, name: str, value: Any, minimum: int) -> int:
    """``value`` if it is an integer of at least ``minimum``, else a ValueError saying so."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f'{owner}: {name} must be an integer >= {minimum}, got {value!r}.')
    return value


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float,
    high: float = float('inf'),
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """``value`` if it lies in the interval, else a ValueError naming the interval.

    The ends belong to the interval unless ``open_low`` / ``open_high`` say otherwise.
    """
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    ok = ok and (low < value if open_low else low <= value)
    ok = ok and (value < high if open_high else value <= high)
    if not ok:
        left, right = '(' if open_low else '[', ')' if open_high or high == float('inf') else ']'
        raise ValueError(
            f'{owner}: {name} must be a number in {left}{low:g}, {high:g}{right}, got {value!r}.'
        )
    return float(value)


def check_choice(owner: str, name: str, value: Any, choices: Iterable[Any]) -> Any:
    """``value`` if it is one of ``choices``, else a ValueError listing them."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(
            f'{owner}: {name} must be one of {choices}, got {value!r}.'
            f'{closest(value, [c for c in choices if isinstance(c, str)])}'
        )
    return value


def check_flag(owner: str, name: str, value: Any) -> bool:
    """``value`` if it is True or False, else a ValueError saying so."""
    if not isinstance(value, bool):
        raise ValueError(f'{owner}: {name} must be True or False, got {value!r}.')
    return value


def check_kind(owner: str, name: str, value: Any, kind: type) -> Any:
    """``value`` if it is an instance of ``kind``, else a TypeError that says how to make one."""
    if not isinstance(value, kind):
        raise TypeError(
            f'{owner}: {name} must be a {kind.__name__}, got {value!r}. To build one from a '
            'dict, use mdeq_mm.registry.build_part.'
        )
    return value


def describe(cls: type | None) -> str:
    """Module and name of a class, for error messages."""
    return 'None' if cls is None else f'{cls.__module__}.{cls.__qualname__}'
