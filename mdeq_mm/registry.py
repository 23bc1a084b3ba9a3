"""Builds the parts of an implicit layer from config dicts; their names live in MM's registry."""

from typing import Any, Mapping, Type, TypeVar, Union

from mmengine.registry import TASK_UTILS

from .deq import gradients, solvers
from .options import closest, describe

T = TypeVar('T')

for _part in (
    solvers.FixedPointIteration,
    solvers.Anderson,
    solvers.LimitedMemoryBroyden,
    gradients.ImplicitGradient,
    gradients.TruncatedGradient,
    gradients.JacobianFreeGradient,
    gradients.SharedInverseGradient,
    gradients.PhantomGradient,
):
    TASK_UTILS.register_module(module=_part)


def build_part(cfg: Union[Mapping[str, Any], T], kind: Type[T]) -> T:
    """The solver or gradient a config describes.

    Args:
        cfg (dict | object): ``dict(type=NAME, **options)``, or an instance, which is returned.
        kind (type): What it has to be, e.g. :class:`~mdeq_mm.solvers.Solver`. Every registered
            subclass is a valid choice, those of a user's ``custom_imports`` included.
    """
    if isinstance(cfg, kind):
        return cfg
    what = kind.__name__.lower()
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise TypeError(f"{what} must be a dict with a 'type', got {cfg!r}.")
    options = dict(cfg)
    name = options.pop('type')
    cls = TASK_UTILS.get(name) if isinstance(name, str) else name
    if not isinstance(cls, type) or not issubclass(cls, kind):
        valid = sorted(
            key
            for key, value in TASK_UTILS.module_dict.items()
            if isinstance(value, type) and issubclass(value, kind)
        )
        found = f' (that is {describe(cls)})' if isinstance(cls, type) else ''
        raise ValueError(
            f'{name!r} is not a {what}{found}.{closest(name, valid)} Valid: {", ".join(valid)}.'
        )
    return cls(**options)
