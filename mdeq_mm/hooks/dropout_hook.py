"""Draws new variational dropout masks each iteration, for nets that do not do so themselves."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..layers import reset_masks


@HOOKS.register_module()
class VariationalDropoutHook(Hook):
    """Resets every ``VariationalDropout2d`` of the model before each training iteration.

    Not needed for ``MDEQBackbone``, which resets its own.
    """

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        reset_masks(runner.model)
