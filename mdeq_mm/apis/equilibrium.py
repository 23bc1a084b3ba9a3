"""The equilibria in a model: found, and solved with other budgets for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..deq import ImplicitLayer, implicit_layers


def find_layers(model: nn.Module) -> list[ImplicitLayer]:
    """Every implicit layer of a model, whoever built it.

    Raises:
        ValueError: If there is none.
    """
    layers = implicit_layers(model)
    if not layers:
        raise ValueError(
            'the model has no equilibrium: no MDEQBackbone and no other module around an '
            'ImplicitLayer'
        )
    return layers


def find_backbone(model: nn.Module) -> nn.Module:
    """The model's MDEQBackbone, or the module in its place: one with ``problem(x)``.

    Its ``implicit`` is its ImplicitLayer.

    Raises:
        ValueError: If there is none, or several.
    """
    found = [
        module
        for module in model.modules()
        if callable(getattr(module, 'problem', None))
        and isinstance(getattr(module, 'implicit', None), ImplicitLayer)
    ]
    if len(found) != 1:
        raise ValueError(
            f'the model has {len(found)} MDEQBackbone modules (or others with problem(x) and an '
            'ImplicitLayer named implicit); want exactly one'
        )
    return found[0]


@contextmanager
def limited_evaluations(model: nn.Module, count: int) -> Iterator[None]:
    """Within the block, a solve in evaluation mode ends after ``count`` evaluations of f.

    A layer that unrolls f applies it ``count`` times. What was set before is set again after.

    Args:
        model: Every implicit layer in it is limited.
        count: At least 1.

    Raises:
        ValueError: If the model has no equilibrium.
    """
    layers = find_layers(model)
    before = [(layer.eval_solver, layer.unrolled_layers) for layer in layers]
    try:
        for layer in layers:
            if layer.unrolled_layers:
                layer.unrolled_layers = count
            else:
                solver = layer.eval_solver or layer.solver
                layer.eval_solver = solver.replace(max_iter=count, jitter=None)
        yield
    finally:
        for layer, (eval_solver, unrolled_layers) in zip(layers, before):
            layer.eval_solver, layer.unrolled_layers = eval_solver, unrolled_layers


@contextmanager
def unrolled(layer: ImplicitLayer, count: int) -> Iterator[None]:
    """Within the block, the layer applies f ``count`` times instead of solving."""
    before = layer.unrolled_layers
    layer.unrolled_layers = count
    try:
        yield
    finally:
        layer.unrolled_layers = before
