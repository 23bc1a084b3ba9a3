"""Training that starts as an explicit net and continues as an equilibrium (paper, §3.3)."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ..deq import ImplicitLayer, implicit_layers
from ..options import check_int, checks_options


def smooth_cells(model: nn.Module) -> list[nn.Module]:
    """Every f of a model that has a softplus switch: a cell with a flag ``smooth``."""
    return [
        module
        for module in model.modules()
        if hasattr(module, 'state_shapes') and isinstance(getattr(module, 'smooth', None), bool)
    ]


@HOOKS.register_module()
@checks_options
class MDEQWarmupHook(Hook):
    """Unrolls f, and replaces its last ReLUs by softplus, for the first iterations.

    The phase depends only on ``runner.iter``, so a resumed run continues in it. Validation
    evaluates the network that is being trained, unrolled or not, and the log says which.
    tools/test.py always tests a checkpoint as an equilibrium, also one saved during the warm-up.

    Args:
        unrolled_iters (int): Iterations trained with plain backpropagation through the unrolled
            net.
        unrolled_layers (int): Evaluations of f in that net.
        softplus_iters (int): Iterations with softplus in place of the last ReLU of the residual
            blocks and of the fusion.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(
        self, unrolled_iters: int = 0, unrolled_layers: int = 5, softplus_iters: int = 0
    ) -> None:
        name = type(self).__name__
        self.unrolled_iters = check_int(name, 'unrolled_iters', unrolled_iters, 0)
        self.unrolled_layers = check_int(name, 'unrolled_layers', unrolled_layers, 1)
        self.softplus_iters = check_int(name, 'softplus_iters', softplus_iters, 0)
        self._configured: dict[ImplicitLayer, int] = {}
        self._cells: list[nn.Module] = []
        self._phase: tuple[bool, bool] | None = None

    def before_train(self, runner: Runner) -> None:
        layers = implicit_layers(runner.model)
        if not layers and (self.unrolled_iters or self.softplus_iters):
            raise ValueError(
                'MDEQWarmupHook found no equilibrium in the model: neither MDEQBackbone nor '
                'another module with an ImplicitLayer. Switch the hook off with '
                'default_hooks.warmup.unrolled_iters=0 default_hooks.warmup.softplus_iters=0, or '
                "set model.backbone.type='MDEQBackbone'."
            )
        self._configured = {layer: layer.unrolled_layers for layer in layers}
        self._cells = smooth_cells(runner.model)
        if self.softplus_iters and not self._cells:
            raise ValueError(
                f'MDEQWarmupHook: softplus_iters={self.softplus_iters}, but no cell of the model '
                'has a flag smooth to switch. Set softplus_iters=0.'
            )
        self._phase = None
        self._apply(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._apply(runner)

    def before_val(self, runner: Runner) -> None:
        if self._phase is not None:
            runner.logger.info(f'Validating the network in training: {self._describe()}.')

    def after_train(self, runner: Runner) -> None:
        for layer, layers in self._configured.items():
            layer.unrolled_layers = layers
        for cell in self._cells:
            cell.smooth = False
        self._configured, self._cells, self._phase = {}, [], None

    def _apply(self, runner: Runner) -> None:
        """Set the phase of ``runner.iter``; log when it changes."""
        phase = (runner.iter < self.unrolled_iters, runner.iter < self.softplus_iters)
        if phase == self._phase:
            return
        self._phase = phase
        for layer, layers in self._configured.items():
            layer.unrolled_layers = self.unrolled_layers if phase[0] else layers
        for cell in self._cells:
            cell.smooth = phase[1]
        runner.logger.info(f'MDEQ from iteration {runner.iter}: {self._describe()}.')

    def _describe(self) -> str:
        unrolled, smooth = self._phase
        if unrolled:
            text = f'{self.unrolled_layers} unrolled layers until {self.unrolled_iters}'
        elif any(self._configured.values()):
            text = f'{max(self._configured.values())} unrolled layers'
        else:
            text = 'equilibrium'
        return f'{text}, softplus until {self.softplus_iters}' if smooth else f'{text}, ReLU'
