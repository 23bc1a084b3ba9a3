"""Whether neck and heads take the scales that the backbone returns."""


def check_scales(model: dict) -> None:
    """Compare the scales that neck and heads expect with those an MDEQ backbone returns.

    Args:
        model: The model's config.

    Raises:
        ValueError: If they disagree, which MM would notice only in the first iteration.
    """
    backbone = model.get('backbone') or {}
    channels, out_indices = backbone.get('channels'), backbone.get('out_indices')
    if backbone.get('type') != 'MDEQBackbone' or channels is None:
        return
    if out_indices is None:
        out_indices = range(len(channels))
    if not all(0 <= i < len(channels) for i in out_indices):
        return  # the backbone says what is wrong with that
    out = [channels[i] for i in out_indices]
    necks = model.get('neck') or []
    for part in necks if isinstance(necks, (list, tuple)) else [necks]:
        if part.get('type') == 'MDEQFuseNeck' and list(part.get('in_channels', out)) != out:
            raise ValueError(
                f'model.neck.in_channels is {list(part.in_channels)}, but the backbone returns '
                f'scales of {out} channels; make them equal'
            )
    if necks:
        return
    for name in ('decode_head', 'auxiliary_head'):
        heads = model.get(name) or []
        for head in heads if isinstance(heads, (list, tuple)) else [heads]:
            _check_head_scales(name, head, out)


def _check_head_scales(name: str, head: dict, out: list[int]) -> None:
    """Compare ``in_channels`` and ``in_index`` of one mmseg head with the backbone's scales."""
    wanted, index = head.get('in_channels'), head.get('in_index', -1)
    if wanted is None:
        return
    wanted = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    index = list(index) if isinstance(index, (list, tuple)) else [index]
    scales = [out[i] if -len(out) <= i < len(out) else None for i in index]
    if wanted != scales:
        raise ValueError(
            f'model.{name} takes in_channels={wanted} at in_index={index}, but the backbone '
            f'returns {len(out)} scales of {out} channels; give in_channels and in_index that '
            'name these scales, or change model.backbone.channels'
        )
