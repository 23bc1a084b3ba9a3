"""Group normalization for f: checked early, and fast in low precision."""

from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..kernels import KERNELS, Norm, norm_relu
from ..options import check_choice, checks_options


def check_groups(
    channels: int, num_groups: int, owner: str = 'GroupNorm', halved: bool = False
) -> None:
    """Raise unless ``num_groups`` divides ``channels``; the message lists what does.

    With ``halved``, ``num_groups // 2``, the groups of the norm after the fusion, must divide it
    too.
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

    Autocast runs group norm in float32, which doubles the memory traffic of every map of f. Here
    the maps stay in low precision; mean and variance are computed in float32. In a config:
    ``norm_cfg=dict(type='MDEQGroupNorm', num_groups=8)``.

    Args:
        num_features (int): Channels.
        num_groups (int): Groups; must divide the channels.
        eps (float): Added to the variance.
        affine (bool): Learn a scale and a shift per channel.
        kernel (str): The implementation, one of :data:`mdeq_mm.kernels.KERNELS`.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 8,
        eps: float = 1e-5,
        affine: bool = True,
        kernel: str = 'auto',
    ) -> None:
        name = type(self).__name__
        check_groups(num_features, num_groups, name)
        super().__init__(num_groups, num_features, eps=eps, affine=affine)
        self.kernel = check_choice(name, 'kernel', kernel, KERNELS)

    @property
    def norm(self) -> Norm:
        """The norm as the operations of :mod:`mdeq_mm.kernels` take it."""
        return Norm(self.num_groups, self.weight, self.bias, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(x, self.norm, relu=False, kernel=self.kernel)


def fusible(*modules: nn.Module) -> bool:
    """Whether all are group norms whose result only the next operation uses.

    Subclasses and modules with hooks are called as modules.
    """
    return all(type(m) is MDEQGroupNorm and not has_hooks(m) for m in modules)


def is_group_norm(norm_cfg: dict[str, Any]) -> bool:
    """Whether a norm's type is torch's group norm: MM's name, the class, or its full name."""
    kind = norm_cfg.get('type')
    if isinstance(kind, str) and kind.startswith('torch.nn.'):
        return kind.endswith('.GroupNorm')
    return kind in ('GN', nn.GroupNorm)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module is more than its ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def build_norm(norm_cfg: dict[str, Any], channels: int, halve_groups: bool = False) -> nn.Module:
    """The normalization of f for ``channels`` channels.

    Args:
        norm_cfg (dict): As in MM. ``GN`` builds :class:`MDEQGroupNorm`, the same function with the
            same state dict.
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
    if is_group_norm(cfg):
        cfg['type'] = 'MDEQGroupNorm'
    if 'num_groups' in cfg:
        if halve_groups:
            cfg['num_groups'] = max(1, cfg['num_groups'] // 2)
        check_groups(channels, cfg['num_groups'], f'norm_cfg={dict(norm_cfg)}')
    return build_norm_layer(cfg, channels)[1]
