"""The border between configs and the core: dicts become objects of :mod:`mdeq_mm.deq`.

The core's parts are registered here; a user registers more by ``@TASK_UTILS.register_module()``.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import MODELS, TASK_UTILS

from . import deq
from .options import closest, describe

T = TypeVar('T')

_WORDS = {deq.ZeroStart: 'start', deq.JacobianRegularizer: 'regularizer'}
_BASES = (deq.Part, deq.Solver, deq.Gradient)
for _name in deq.__all__:
    _part = getattr(deq, _name)
    if isinstance(_part, type) and issubclass(_part, deq.Part) and _part not in _BASES:
        TASK_UTILS.register_module(module=_part)


def type_name(cfg: Any) -> str:
    """Name of the class that a config's ``type`` is, or names, without module or scope before it.

    Configs name a class (``'IoUMetric'``, ``'mmseg.IoUMetric'``), or in pure Python are given the
    class itself, which mmengine may not have imported yet. What compares types takes their names.

    Args:
        cfg: A dict with a ``type``; of anything else the name is ``'None'``.
    """
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    if isinstance(kind, (LazyObject, LazyAttr)):
        kind = kind.build()
    return str(getattr(kind, '__name__', kind)).rsplit('.', 1)[-1]


def build_part(cfg: Mapping[str, Any] | T, kind: type[T]) -> T:
    """The solver, gradient, start or regularizer a config describes.

    Args:
        cfg (dict | object): ``dict(type=NAME, **options)``, or an instance, which is returned. A
            ``solver`` among the options, as of a gradient, is built likewise.
        kind (type): The wanted base class, e.g. :class:`~mdeq_mm.deq.Solver`. Every registered
            subclass is valid, including those of a user's ``custom_imports``.

    Raises:
        TypeError: ``cfg`` is not a dict with a type, or has an option that the class lacks.
        ValueError: The type is not such a part, or an option has an invalid value.
    """
    if isinstance(cfg, kind):
        return cfg
    what = _WORDS.get(kind, kind.__name__.lower())
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
    for key, value in options.items():
        if key == 'solver':
            options[key] = build_part(value, deq.Solver)
        elif isinstance(value, list):
            # Config files and the command line give a pair as a list.
            options[key] = tuple(value)
    return cls(**options)


@MODELS.register_module(name='ImplicitLayer')
def build_implicit(
    solver: Mapping[str, Any] | deq.Solver,
    gradient: Mapping[str, Any] | deq.Gradient,
    start: Mapping[str, Any] | deq.ZeroStart = dict(type='ZeroStart'),
    eval_solver: Mapping[str, Any] | deq.Solver | None = None,
    regularizer: Mapping[str, Any] | deq.JacobianRegularizer | None = None,
    **options: Any,
) -> deq.ImplicitLayer:
    """An :class:`~mdeq_mm.deq.ImplicitLayer` built from configs, for a user's own module.

    Args:
        solver (dict | Solver): Finds the equilibrium.
        gradient (dict | Gradient): Carries gradients through it.
        start (dict | ZeroStart): Where a solve begins.
        eval_solver (dict | Solver, optional): Options of ``solver`` that differ in evaluation mode,
            such as ``dict(max_iter=18)``. With a ``type`` among them it is a solver of its own.
        regularizer (dict | JacobianRegularizer, optional): A penalty in training.
        options: The other options of ``ImplicitLayer``.
    """
    solver = build_part(solver, deq.Solver)
    if isinstance(eval_solver, Mapping) and 'type' not in eval_solver:
        # Jitter is for training only, and its range might exclude the other max_iter.
        eval_solver = solver.replace(**{'jitter': None, **eval_solver})
    elif eval_solver is not None:
        eval_solver = build_part(eval_solver, deq.Solver)
    if regularizer is not None:
        regularizer = build_part(regularizer, deq.JacobianRegularizer)
    return deq.ImplicitLayer(
        solver,
        build_part(gradient, deq.Gradient),
        build_part(start, deq.ZeroStart),
        eval_solver=eval_solver,
        regularizer=regularizer,
        **options,
    )
