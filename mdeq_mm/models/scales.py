"""Whether neck and heads take the scales that the backbone returns."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..registry import type_name
from .backbone import ARCHS, MDEQBackbone

_HEADS = ('decode_head', 'auxiliary_head')
# Lists of heads that are still empty where they become part of a model: name of the list, and
# channels of the scales that its heads will be given.
_LISTS: WeakKeyDictionary[nn.ModuleList, tuple[str, list[int]]] = WeakKeyDictionary()


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
        heads = model.get(name)
        for key, head in enumerate(_listed(heads)):
            place = f'{name}.{key}' if isinstance(heads, (list, tuple)) else name
            _check_head(place, head.get('in_channels'), head.get('in_index'), out)


def check_built_scales(model: nn.Module, name: str, part: nn.Module | None) -> None:
    """The same for a model of MM while its constructor puts its parts together.

    A hook of torch, called for each module that becomes part of another: so MM's own tools, too,
    say it in one sentence, before data are read.

    Raises:
        ValueError: If they disagree.
    """
    if isinstance(model, nn.ModuleList) and model in _LISTS:
        place, out = _LISTS[model]
        _check_built_head(f'{place}.{name}', part, out)
        return
    if name not in ('neck', *_HEADS):
        return
    backbone = model._modules.get('backbone')
    if not isinstance(backbone, MDEQBackbone):
        return
    out = [backbone.channels[i] for i in backbone.out_indices]
    if name == 'neck':
        # Of several in a row, the first takes what the backbone returns.
        first = part[0] if isinstance(part, nn.Sequential) and len(part) else part
        _check_neck(type(first).__name__, getattr(first, 'in_channels', None), out)
    elif model._modules.get('neck') is None:
        _check_built_head(name, part, out)


def _check_built_head(place: str, part: nn.Module | None, out: list[int]) -> None:
    """Compare a head, or those of a list, with the scales ``out``."""
    if isinstance(part, nn.ModuleList):
        # mmseg's models fill such a list after it became part of them.
        _LISTS[part] = place, out
        for key, head in enumerate(part):
            _check_built_head(f'{place}.{key}', head, out)
    elif part is not None:
        # A head that concatenates its scales keeps the sum of their channels.
        concatenates = getattr(part, 'input_transform', None) == 'resize_concat'
        wanted, index = getattr(part, 'in_channels', None), getattr(part, 'in_index', None)
        _check_head(place, wanted, index, out, sum if concatenates else list)


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
        name: ``decode_head`` or ``auxiliary_head``, of a list with the place in it.
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
