"""Group normalization for f: checked early, and fast in low precision."""

from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..options import checks_options


def check_groups(
    channels: int, num_groups: int, owner: str = 'GroupNorm', halved: bool = False
) -> None:
    """Raise unless ``num_groups`` divides ``channels``; the message lists what does.

    ``halved`` wants the same of ``num_groups // 2``, the groups of the norm after the fusion.
    """

    def splits(groups: int) -> bool:
        wanted = (groups, max(1, groups // 2)) if halved else (groups,)
        return groups >= 1 and all(channels % g == 0 for g in wanted)

    if not splits(num_groups):
        valid = [g for g in range(1, channels + 1) if splits(g)]
        half = f' and, after the fusion, {num_groups // 2}' if halved and num_groups > 3 else ''
        raise ValueError(
            f'{owner}: {channels} channels do not split into {num_groups} groups{half}. Choose '
            f'num_groups from {valid}, or channels divisible by {max(num_groups, 1)}{half}.'
        )


@MODELS.register_module()
@checks_options
class MDEQGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that keeps the dtype of its input under autocast.

    Autocast runs group norm in float32 and so doubles the traffic of every map of f. Here the
    maps stay in low precision; the kernels still take mean and variance in float32. In a config:
    ``norm_cfg=dict(type='MDEQGroupNorm', num_groups=8)``.

    Args:
        num_features (int): Channels.
        num_groups (int): Groups; must divide the channels.
        eps (float): Added to the variance.
        affine (bool): Learn a scale and a shift per channel.
    """

    def __init__(
        self, num_features: int, num_groups: int = 8, eps: float = 1e-5, affine: bool = True
    ) -> None:
        check_groups(num_features, num_groups, type(self).__name__)
        super().__init__(num_groups, num_features, eps=eps, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        # The meta device of shape and FLOP counters knows no autocast.
        if device == 'meta' or not torch.is_autocast_enabled(device):
            return self._normalize(x, self.weight, self.bias)
        with torch.autocast(device, enabled=False):
            weight, bias = self.weight, self.bias
            # The CPU kernel takes float32 affine beside low-precision maps, the others do not.
            if self.affine and device != 'cpu':
                weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return self._normalize(x, weight, bias)

    def _normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        # F.group_norm refuses groups of one value, which batch norm could not train on. Here they
        # are as good as any: an image of one pixel, normalized to zero.
        return torch.group_norm(x, self.num_groups, weight, bias, self.eps)


def build_norm(norm_cfg: dict[str, Any], channels: int, halve_groups: bool = False) -> nn.Module:
    """The normalization of f for ``channels`` channels.

    Args:
        norm_cfg (dict): As MM takes it. ``GN`` gives :class:`MDEQGroupNorm`, which is the same
            function with the same state dict.
        channels (int): Channels to normalize.
        halve_groups (bool): Use ``num_groups // 2`` groups, as the released networks do after
            the fusion. Ignored by norms without groups.
    """
    cfg = dict(norm_cfg)
    kind = cfg.get('type')
    if 'BN' in str(kind) or 'BatchNorm' in str(kind):
        raise ValueError(
            f'norm_cfg type {kind!r} cannot normalize f: batch statistics tie the equilibria of '
            "a batch together (paper, §3.3). Use dict(type='GN', num_groups=8)."
        )
    if kind == 'GN':
        cfg['type'] = 'MDEQGroupNorm'
    if 'num_groups' in cfg:
        if halve_groups:
            cfg['num_groups'] = max(1, cfg['num_groups'] // 2)
        check_groups(channels, cfg['num_groups'], f'norm_cfg={dict(norm_cfg)}')
    return build_norm_layer(cfg, channels)[1]
