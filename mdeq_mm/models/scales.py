"""Whether neck and heads take the scales that the backbone returns."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .backbone import ARCHS, MDEQBackbone

_HEADS = ('decode_head', 'auxiliary_head')


def check_scales(model: dict) -> None:
    """Compare the scales that neck and heads expect with those an MDEQ backbone returns.

    Args:
        model: The model's config; types by name or as classes.

    Raises:
        ValueError: If they disagree, which MM would notice in the first iteration only.
    """
    backbone = model.get('backbone') or {}
    if type_name(backbone) != 'MDEQBackbone':
        return
    channels, out_indices = backbone.get('channels'), backbone.get('out_indices')
    try:
        channels = list(
            ARCHS[backbone.get('arch') or 'small']['channels'] if channels is None else channels
        )
        out = [channels[i] for i in (range(len(channels)) if out_indices is None else out_indices)]
    except (TypeError, LookupError):
        return  # the backbone says what is wrong with that
    necks = _listed(model.get('neck'))
    # Of several in a row, the first takes what the backbone returns.
    for neck in necks[:1]:
        _check_neck(type_name(neck), neck.get('in_channels'), out)
    for name in _HEADS if not necks else ():
        for head in _listed(model.get(name)):
            _check_head(name, head.get('in_channels'), head.get('in_index'), out)


def type_name(cfg: Any) -> str:
    """Name of the class that a config's ``type`` is, or names, without a scope before it."""
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    return getattr(kind, '__name__', None) or str(kind).rsplit('.', 1)[-1]


def check_built_scales(model: nn.Module, name: str, part: nn.Module | None) -> None:
    """The same for a model of MM while its constructor puts its parts together.

    A hook of torch, called for each module that becomes part of another: so MM's own tools, too,
    say it in one sentence, before data are read.

    Raises:
        ValueError: If they disagree.
    """
    if name not in ('neck', *_HEADS):
        return
    backbone = model._modules.get('backbone')
    if not isinstance(backbone, MDEQBackbone):
        return
    out = [backbone.channels[i] for i in backbone.out_indices]
    if isinstance(part, nn.Sequential) and len(part):
        part = part[0]
    wanted = getattr(part, 'in_channels', None)
    if name == 'neck':
        _check_neck(type(part).__name__, wanted, out)
    elif model._modules.get('neck') is None and isinstance(part, nn.Module):
        index = getattr(part, 'in_index', None)
        if getattr(part, 'input_transform', None) == 'resize_concat':
            # Such a head keeps the sum.
            _check_head(name, wanted, index, out, sum)
        else:
            _check_head(name, wanted, index, out)


def _listed(value: Any) -> list:
    value = [] if value is None else value
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_neck(kind: str, wanted: Any, out: Sequence[int]) -> None:
    if isinstance(wanted, (list, tuple)) and list(wanted) != list(out):
        raise ValueError(
            f'model.neck.in_channels is {list(wanted)} ({kind}), but the backbone returns scales '
            f'of {list(out)} channels; make them equal'
        )


def _check_head(
    name: str, wanted: Any, index: Any, out: Sequence[int], kept: Callable = list
) -> None:
    """Compare ``in_channels`` and ``in_index`` of one mmseg head with the backbone's scales.

    Args:
        name: ``decode_head`` or ``auxiliary_head``.
        wanted: Its channels, one number or several.
        index: Its indices, one or several. None is mmseg's default, the last scale; a head that
            takes several without naming them takes all.
        out: Channels of the scales returned.
        kept: What the head makes of the channels of several scales.
    """
    if wanted is None:
        return
    if index is None:
        index = list(range(len(out))) if isinstance(wanted, (list, tuple)) else -1
    index = _listed(index)
    scales = [out[i] if -len(out) <= i < len(out) else None for i in index]
    if None in scales or _listed(wanted) != _listed(kept(scales)):
        raise ValueError(
            f'model.{name} takes in_channels={wanted} at in_index={index}, but the backbone '
            f'returns {len(out)} scales of {list(out)} channels; give in_channels and in_index '
            'that name these scales, or change model.backbone.channels or arch'
        )
