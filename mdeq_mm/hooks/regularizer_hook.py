"""Adds penalties of implicit layers to the losses of any model (Bai, Koltun & Kolter 2021)."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ..deq import ImplicitLayer, JacobianRegularizer, implicit_layers
from ..options import check_int, check_number, checks_options


@HOOKS.register_module()
@checks_options
class MDEQRegularizerHook(Hook):
    """Adds the penalty of every ``JacobianRegularizer`` to the losses, as ``loss_jacobian``.

    The model's own forward returns it among its losses, whatever the model is. So it is scaled,
    accumulated, summed and logged as they are, also inside distributed wrappers. Iterations without
    a penalty log none. If the model has no regularizer, the hook does nothing.

    The weight's schedule depends only on the iteration, so a resumed run continues it.

    Args:
        weight_step (float): Added to the weight every ``step_interval`` iterations.
        step_interval (int, optional): Iterations between two steps of the weight; None keeps it
            constant.
        begin_iter (int): The iteration from which the steps are counted, such as the end of a
            warm-up.
        end_iter (int, optional): The iteration from which on there is no penalty.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        weight_step: float = 0.0,
        step_interval: int | None = None,
        begin_iter: int = 0,
        end_iter: int | None = None,
    ) -> None:
        name = type(self).__name__
        self.weight_step = check_number(name, 'weight_step', weight_step, 0)
        self.step_interval, self.end_iter = step_interval, end_iter
        if step_interval is not None:
            check_int(name, 'step_interval', step_interval, 1)
        elif weight_step:
            raise ValueError(
                f'{name}: weight_step={weight_step} needs step_interval, the iterations between '
                'two steps.'
            )
        self.begin_iter = check_int(name, 'begin_iter', begin_iter, 0)
        if end_iter is not None:
            check_int(name, 'end_iter', end_iter, 0)
        self._configured: dict[ImplicitLayer, JacobianRegularizer] = {}
        self._handle: Any = None

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        layers = implicit_layers(model)
        self._configured = {layer: layer.regularizer for layer in layers if layer.regularizer}
        if not self._configured and (self.step_interval or self.end_iter is not None):
            raise ValueError(
                'MDEQRegularizerHook has a schedule but the model has no regularizer: set '
                "model.backbone.regularizer=dict(type='JacobianRegularizer', weight=0.5), or "
                'remove the options of default_hooks.regularizer.'
            )
        if self._configured:
            self._handle = model.register_forward_hook(_add_penalty)
        self._apply(runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._apply(runner.iter)

    def after_train(self, runner: Runner) -> None:
        for layer, regularizer in self._configured.items():
            layer.regularizer = regularizer
        self._configured = {}
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _apply(self, iteration: int) -> None:
        """Set the regularizer of every layer for an iteration."""
        ended = self.end_iter is not None and iteration >= self.end_iter
        counted = max(0, iteration - self.begin_iter)
        steps = counted // self.step_interval if self.step_interval else 0
        for layer, regularizer in self._configured.items():
            weight = regularizer.weight + steps * self.weight_step
            layer.regularizer = None if ended else regularizer.replace(weight=weight)


def _add_penalty(model: nn.Module, args: tuple, losses: Any) -> Any:
    """A forward hook of the model: adds the penalties of the pass to its losses."""
    if not isinstance(losses, dict):
        return losses
    penalties = [layer.pop_penalty() for layer in implicit_layers(model)]
    penalties = [penalty for penalty in penalties if penalty is not None]
    if not penalties:
        return losses
    return dict(losses, loss_jacobian=sum(penalties[1:], penalties[0]))
