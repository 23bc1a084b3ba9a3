"""Training that survives a batch whose gradient is not finite."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ..options import check_int, checks_options

_REMEDY = (
    'Look at the images and labels of these batches. If it happens again, lower the learning '
    'rate or clip gradients (optim_wrapper.clip_grad.max_norm=1), and under --amp use '
    'optim_wrapper.dtype=bfloat16.'
)


@HOOKS.register_module()
@checks_options
class NonFiniteGradientHook(Hook):
    """Skips and counts optimizer steps whose gradient contains nan or infinity.

    Such a step leaves the weights and the optimizer's state unchanged, and restores the model's
    buffers to their values before the batch: a nan would stay in the running statistics of a batch
    norm forever. The schedule goes on. Gradients are checked after they were averaged over
    processes, so all processes decide alike.

    The number of skipped steps is logged as ``skipped_steps`` from the first one on. It includes
    steps that the loss scaler of mixed precision skipped by itself.

    Args:
        max_in_a_row (int): Training stops with an error after this many consecutive skipped steps.
    """

    # Before EMAHook takes the buffers into its average.
    priority = 'ABOVE_NORMAL'

    def __init__(self, max_in_a_row: int = 50) -> None:
        self.max_in_a_row = check_int(type(self).__name__, 'max_in_a_row', max_in_a_row, 1)
        self._handles = []
        self._buffers: list[tuple[Tensor, Tensor]] | None = None
        self._total = self._in_a_row = 0
        self._stepped = self._warned = False

    def before_train(self, runner: Runner) -> None:
        # A resumed run continues the count.
        self._total = runner.message_hub.runtime_info.get('skipped_steps', 0)
        self._in_a_row, self._buffers, self._stepped = 0, None, False
        wrapper = runner.optim_wrapper
        wrappers = wrapper.values() if hasattr(wrapper, 'optim_wrappers') else [wrapper]

        def check(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            self._before_step(runner, optimizer)

        self._handles = [w.optimizer.register_step_pre_hook(check) for w in wrappers]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        # With gradient accumulation, a skipped step discards all batches since the last step.
        if self._buffers is None:
            self._buffers = [(buffer, buffer.clone()) for buffer in runner.model.buffers()]

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        wrapper = runner.optim_wrapper
        if self._stepped:
            self._buffers = None
        elif hasattr(wrapper, 'loss_scaler') and wrapper.should_update():
            # The scaler saw an infinity and did not call the optimizer.
            self._skip(runner, 'the loss scaler found a gradient that is not finite')
            self._buffers = None
        self._stepped = False
        if self._total:
            runner.message_hub.update_scalar('train/skipped_steps', self._total)

    def after_train(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._buffers = [], None

    def _before_step(self, runner: Runner, optimizer: Optimizer) -> None:
        """Remove the gradients from an optimizer that is about to step with a bad one."""
        self._stepped = True
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        grads = [p.grad for p in parameters if p.grad is not None]
        # The largest absolute value, because a sum of squares of large gradients can overflow.
        if bool(torch.isfinite(get_total_norm(grads, norm_type=float('inf')))):
            self._in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self._skip(runner, 'the gradient is not finite')

    def _skip(self, runner: Runner, reason: str) -> None:
        with torch.no_grad():
            for buffer, before in self._buffers or ():
                buffer.copy_(before)
        self._total += 1
        self._in_a_row += 1
        runner.message_hub.update_info('skipped_steps', self._total)
        what = f'at iteration {runner.iter + 1} {reason}'
        if self._in_a_row >= self.max_in_a_row:
            raise RuntimeError(
                f'NonFiniteGradientHook: {what}, for {self._in_a_row} steps in a row: nothing is '
                f'learned any more. {_REMEDY} Then go on from an earlier checkpoint with '
                '--resume CHECKPOINT. To allow more skipped steps, raise max_in_a_row of this hook.'
            )
        if not self._warned:
            self._warned = True
            runner.logger.warning(
                f'Step skipped: {what}. Weights and the running statistics of norms stay as they '
                f'were. skipped_steps counts such steps; this warning appears once. {_REMEDY}'
            )
