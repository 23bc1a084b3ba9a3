"""The classification neck: all equilibria are brought to the lowest resolution."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import MDEQConv2d
from ..options import check_int, checks_options

_EXPANSION = 4


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions to four times ``width``, with a projected residual."""

    def __init__(self, in_channels: int, width: int, norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        out_channels = _EXPANSION * width
        # As released, only the norm of the residual path learns a scale and a shift.
        plain = dict(norm_cfg, affine=False)
        self.conv1 = ConvModule(in_channels, width, 1, bias=False, norm_cfg=plain)
        self.conv2 = ConvModule(width, width, 3, padding=1, bias=False, norm_cfg=plain)
        self.conv3 = ConvModule(width, out_channels, 1, bias=False, norm_cfg=plain, act_cfg=None)
        self.project = ConvModule(
            in_channels, out_channels, 1, bias=False, norm_cfg=norm_cfg, act_cfg=None
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.project(x))


def _biased_conv(
    cin: int, cout: int, kernel: int, stride: int, norm_cfg: dict[str, Any]
) -> nn.Sequential:
    """Convolution, norm, ReLU. As in the released nets, the convolution has a bias."""
    conv = MDEQConv2d(cin, cout, kernel, stride, padding=kernel // 2)
    return nn.Sequential(conv, build_norm_layer(norm_cfg, cout)[1], nn.ReLU(inplace=True))


@MODELS.register_module()
@checks_options
class MDEQFuseNeck(BaseModule):
    """Fuses the equilibria of all scales into one map for a classifier.

    A bottleneck per scale, then from the highest resolution down: a stride-2 convolution, added
    to the next scale; at the lowest a 1x1 convolution to ``out_channels``. Follow it with
    ``GlobalAveragePooling`` and a linear head. With one scale it is the head of a single-stream
    DEQ.

    Args:
        in_channels (Sequence[int]): Channels of the incoming scales.
        head_channels (Sequence[int]): Inner widths of the bottlenecks, one a scale; they give
            four times as many channels.
        out_channels (int): Channels of the result.
        norm_cfg (dict): Normalization.
        init_cfg (dict | list, optional): MM's initialization.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        head_channels: Sequence[int],
        out_channels: int,
        norm_cfg: dict[str, Any] = dict(type='BN'),
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = [
                dict(type='Normal', layer='Conv2d', std=0.01),
                dict(type='Constant', layer='_BatchNorm', val=1),
            ]
        super().__init__(init_cfg=init_cfg)
        name = type(self).__name__
        if not in_channels or len(in_channels) != len(head_channels):
            raise ValueError(
                f'{name}: in_channels and head_channels must have one entry a scale, got '
                f'{list(in_channels)} and {list(head_channels)}.'
            )
        for value in (*in_channels, *head_channels):
            check_int(name, 'in_channels and head_channels', value, 1)
        check_int(name, 'out_channels', out_channels, 1)
        self.in_channels = tuple(in_channels)
        widths = [_EXPANSION * c for c in head_channels]
        self.num_scales = len(widths)
        self.bottlenecks = nn.ModuleList(
            _Bottleneck(cin, width, norm_cfg) for cin, width in zip(in_channels, head_channels)
        )
        self.downsamples = nn.ModuleList(
            _biased_conv(high, low, 3, 2, norm_cfg) for high, low in zip(widths, widths[1:])
        )
        self.final = _biased_conv(widths[-1], out_channels, 1, 1, norm_cfg)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor]:
        """[(N, Ci, Hi, Wi)] -> one (N, out_channels, H, W) at the lowest resolution."""
        if len(features) != self.num_scales:
            raise ValueError(
                f'MDEQFuseNeck was built for {self.num_scales} scales and got {len(features)}; '
                "its in_channels must match the backbone's channels and out_indices."
            )
        x = self.bottlenecks[0](features[0])
        for i, downsample in enumerate(self.downsamples, start=1):
            x = downsample(x) + self.bottlenecks[i](features[i])
        return (self.final(x),)
