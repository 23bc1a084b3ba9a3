"""The model of a config, without a Runner."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

from ..deq import ImplicitLayer
from .checkpoints import check_checkpoint
from .data import dataset_class, test_dataset


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config for one process, in evaluation mode."""
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def load_model(cfg: Config, checkpoint: str | None, device: str) -> nn.Module:
    """Build the model of a config and load a checkpoint, if one is given.

    ``model.dataset_meta`` holds classes and palette where they are known: those of the checkpoint,
    else those of the test data set.

    Args:
        cfg: The config, options merged.
        checkpoint: A file, or None to keep the initial weights.
        device: Where the model goes.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        UnsafeCheckpointError: If loading it could run code.
        ValueError: If it cannot be read, or lacks weights of this model.
    """
    check_checkpoint(checkpoint)
    model = build_model(cfg)
    meta: dict[str, Any] = {}
    if checkpoint is not None:
        try:
            content = load_checkpoint(model, checkpoint, map_location='cpu', strict=True)
        except RuntimeError as error:
            raise ValueError(f'{checkpoint} does not fit this config: {error}') from error
        meta = content.get('meta') or {}
    model.dataset_meta = meta.get('dataset_meta') or _dataset_meta(cfg)
    return model.to(device)


def _dataset_meta(cfg: Config) -> dict[str, Any]:
    """Classes and palette of the config's test data set; empty if it states none."""
    dataset = test_dataset(cfg) or {}
    known = getattr(dataset_class(dataset), 'METAINFO', None) or {}
    return {**known, **(dataset.get('metainfo') or {})}


def find_backbone(model: nn.Module) -> nn.Module:
    """The model's MDEQBackbone, or a user's module with the same interface.

    The interface is ``problem(x)`` for a batch of images, an ImplicitLayer named ``implicit`` and
    an f named ``cell``.

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
def evaluations_allowed(layer: ImplicitLayer, count: int) -> Iterator[None]:
    """Let a layer in evaluation mode spend ``count`` evaluations of f; restore its solver on exit.

    For an unrolled net ``count`` is the number of layers.

    Args:
        layer: The layer.
        count: Evaluations its solver may spend, not counting the one that follows the solve.
    """
    solver, layers = layer.eval_solver, layer.unrolled_layers
    if layers:
        layer.unrolled_layers = count
    else:
        layer.eval_solver = (solver or layer.solver).replace(max_iter=count, jitter=None)
    try:
        yield
    finally:
        layer.eval_solver, layer.unrolled_layers = solver, layers
