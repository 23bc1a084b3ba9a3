"""f: one residual block per scale, then fusion of all scales (paper, §3.2, Figs. 1 and 2)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..kernels import (
    KERNELS,
    Term,
    norm_relu,
    norm_relu_conv,
    residual_norms,
    resolve,
    sum_rectify,
)
from ..layers import (
    MDEQConv2d,
    MDEQGroupNorm,
    VariationalDropout2d,
    build_norm,
    check_groups,
    fusible,
    has_hooks,
)
from ..options import check_choice, checks_options


def _conv(
    cin: int, cout: int, kernel: int, stride: int = 1, weight_norm: bool = False
) -> nn.Conv2d:
    """A convolution of f; with ``weight_norm`` its weight is a norm per output channel times a
    direction, in torch's parametrization form."""
    conv = MDEQConv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=False)
    return parametrizations.weight_norm(conv, dim=0) if weight_norm else conv


class ResidualBlock(nn.Module):
    """The block of one scale (paper, Eq. 5). Keeps the shape of its input.

    Args:
        channels (int): Channels of the scale.
        expansion (int): Factor by which the inner convolution is wider.
        norm_cfg (dict): Normalization.
        drop_rate (float): Variational dropout after the second convolution.
        weight_norm (bool): Weight-normalize both convolutions.
    """

    def __init__(
        self,
        channels: int,
        expansion: int,
        norm_cfg: dict[str, Any],
        drop_rate: float,
        weight_norm: bool,
    ) -> None:
        super().__init__()
        width = expansion * channels
        self.conv1 = _conv(channels, width, 3, weight_norm=weight_norm)
        self.norm1 = build_norm(norm_cfg, width)
        self.conv2 = _conv(width, channels, 3, weight_norm=weight_norm)
        self.drop = VariationalDropout2d(drop_rate)
        self.norm2 = build_norm(norm_cfg, channels)
        self.norm3 = build_norm(norm_cfg, channels)

    def forward(self, z: Tensor, injection: Tensor = None, smooth: bool = False) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); ``injection`` only reaches the first scale."""
        z = _dense(z)
        out = _norm_conv(self.norm1, self.conv2, self.conv1(z))
        if fusible(self.norm2, self.norm3) and not has_hooks(self.drop):
            mask, kernel = self.drop.mask(out), self.norm2.kernel
            return residual_norms(
                out, z, self.norm2.norm, self.norm3.norm, injection, mask, smooth, kernel
            )
        out = self.drop(out)
        if injection is not None:
            out = out + injection
        out = self.norm2(out) + z
        return self.norm3(F.softplus(out) if smooth else F.relu(out, inplace=True))


def _dense(z: Tensor) -> Tensor:
    """A map of the flat state, copied to its own memory in the dtype that convolutions take.

    Otherwise both its convolution and its sum would make such a copy.
    """
    device = z.device.type
    if device != 'meta' and torch.is_autocast_enabled(device):
        z = z.to(torch.get_autocast_dtype(device))
    last = z.stride(1) == 1
    return z.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _norm(norm: nn.Module, x: Tensor, relu: bool = True) -> Tensor:
    """ReLU of the norm of a convolution's result, which may be overwritten."""
    if fusible(norm):
        return norm_relu(x, norm.norm, relu, norm.kernel, inplace=True)
    return F.relu(norm(x), inplace=True) if relu else norm(x)


def _norm_conv(norm: nn.Module, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of the rectified norm of what a convolution gave, and nothing else needs."""
    plain = type(conv).forward is MDEQConv2d.forward and not has_hooks(conv)
    if plain and fusible(norm):
        return norm_relu_conv(x, norm.norm, conv.weight, conv.padding[0], norm.kernel)
    return conv(_norm(norm, x))


def _term(norm: nn.Module, x: Tensor, upsample: bool = False) -> Term:
    """A normalized map, as a term of a sum."""
    return Term(x, norm.norm, upsample) if fusible(norm) else Term(norm(x), None, upsample)


class Downsample(nn.Sequential):
    """From a higher resolution to a lower: stride-2 convolutions, one for each halving.

    Odd sizes round up. The width stays that of the source until the last convolution.
    """

    def __init__(self, cin: int, cout: int, steps: int, norm_cfg: dict[str, Any]) -> None:
        layers: list[nn.Module] = []
        for step in range(steps):
            width = cout if step == steps - 1 else cin
            layers += [_conv(cin, width, 3, stride=2), build_norm(norm_cfg, width)]
            if step < steps - 1:
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Term:
        """(N, Cj, Hj, Wj) -> the term of the sum, which applies the last norm."""
        layers = list(self)
        *steps, (conv, norm) = zip(layers[::3], layers[1::3])
        for inner, inner_norm in steps:
            x = _norm(inner_norm, inner(x))
        return _term(norm, conv(x))


class Upsample(nn.Module):
    """From a lower resolution to a higher: 1x1 convolution and norm at the lower one, then resize.

    Args:
        cin, cout (int): Channels of the source and of the target scale.
        norm_cfg (dict): Normalization.
        mode (str): ``'nearest'``, as the released weights were trained, or ``'bilinear'``, as
            the paper says.
    """

    def __init__(self, cin: int, cout: int, norm_cfg: dict[str, Any], mode: str) -> None:
        super().__init__()
        self.conv = _conv(cin, cout, 1)
        self.norm = build_norm(norm_cfg, cout)
        self.mode = mode

    def forward(self, x: Tensor, size: Sequence[int]) -> Term:
        """(N, Cj, Hj, Wj) -> the term of a sum of ``size``, which resizes to the nearest."""
        x = self.conv(x)
        if self.mode == 'nearest':
            return _term(self.norm, x, upsample=True)
        x = self.norm(x)
        return Term(F.interpolate(x, size=tuple(size), mode=self.mode, align_corners=False))


class Fusion(nn.Module):
    """Mixes all scales into one: sum, rectify, 1x1 convolution, norm.

    Args:
        index (int): The target scale.
        channels (Sequence[int]): Channels of every scale, highest resolution first.
        norm_cfg (dict): Normalization; the last norm takes half the groups.
        weight_norm (bool): Weight-normalize the last convolution.
        upsample (str): Mode of :class:`Upsample`.
        kernel (str): The implementation of the sum, one of :data:`mdeq_mm.kernels.KERNELS`.
    """

    def __init__(
        self,
        index: int,
        channels: Sequence[int],
        norm_cfg: dict[str, Any],
        weight_norm: bool,
        upsample: str,
        kernel: str,
    ) -> None:
        super().__init__()
        self.index, self.kernel = index, kernel
        target = channels[index]
        self.sources = nn.ModuleDict()
        for j, width in enumerate(channels):
            if j < index:
                self.sources[str(j)] = Downsample(width, target, index - j, norm_cfg)
            elif j > index:
                self.sources[str(j)] = Upsample(width, target, norm_cfg, upsample)
        self.conv = _conv(target, target, 1, weight_norm=weight_norm)
        self.norm = build_norm(norm_cfg, target, halve_groups=True)

    def forward(self, features: Sequence[Tensor], smooth: bool = False) -> Tensor:
        """[(N, Ci, Hi, Wi)] -> (N, C, H, W) of the target scale."""
        own = features[self.index]
        size = own.shape[-2:]
        terms = [
            path(features[int(j)], size) if int(j) > self.index else path(features[int(j)])
            for j, path in self.sources.items()
        ]
        total = sum_rectify(own, terms, smooth, self.kernel)
        return _norm(self.norm, self.conv(total), relu=False)


@MODELS.register_module()
@checks_options
class MDEQCell(nn.Module):
    """f of a multiscale deep equilibrium model. One forward is one evaluation of f.

    Args:
        channels (Sequence[int]): Channels per scale, highest resolution first.
        expansion (int): Width factor inside the residual blocks.
        norm_cfg (dict): Normalization, group norm in the paper.
        drop_rate (float): Rate of variational dropout.
        weight_norm (bool): Weight-normalize the convolutions of the blocks and the last one of
            every fusion.
        upsample (str): ``'nearest'`` or ``'bilinear'``.
        norm_kernel (str): The implementation of norms, rectifiers and sums: ``'native'``,
            ``'cpp'``, ``'compiled'`` or ``'auto'``; see :mod:`mdeq_mm.kernels`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        expansion: int = 5,
        norm_cfg: dict[str, Any] = dict(type='GN', num_groups=8),
        drop_rate: float = 0.0,
        weight_norm: bool = True,
        upsample: str = 'nearest',
        norm_kernel: str = 'auto',
    ) -> None:
        super().__init__()
        check_choice('MDEQCell', 'upsample', upsample, ('nearest', 'bilinear'))
        self.norm_kernel = check_choice('MDEQCell', 'norm_kernel', norm_kernel, KERNELS)
        for i, c in enumerate(channels):
            # Checked before the inner norms, whose widths the user did not write, can complain.
            check_groups(
                c, norm_cfg.get('num_groups', 1), f'channels[{i}] with {norm_cfg}', halved=True
            )
        self.channels = tuple(channels)
        self.blocks = nn.ModuleList(
            ResidualBlock(c, expansion, norm_cfg, drop_rate, weight_norm) for c in channels
        )
        self.fusions = nn.ModuleList(
            Fusion(i, channels, norm_cfg, weight_norm, upsample, norm_kernel)
            for i in range(len(channels))
        )
        for module in self.modules():
            if isinstance(module, MDEQGroupNorm):
                module.kernel = norm_kernel
        #: Softplus in place of the last ReLU of blocks and fusions (paper, §3.3).
        self.smooth = False

    def forward(self, states: Sequence[Tensor], injection: Tensor) -> list[Tensor]:
        """z -> f(z; x).

        Args:
            states (Sequence[Tensor]): z, (N, Ci, Hi, Wi) per scale; left as they are.
            injection (Tensor): x, of the shape of the first scale.
        """
        injections = [injection] + [None] * (len(states) - 1)
        features = [
            block(z, x, self.smooth) for block, z, x in zip(self.blocks, states, injections)
        ]
        return [fusion(features, self.smooth) for fusion in self.fusions]

    def state_shapes(self, injection: Tensor) -> list[tuple[int, int, int]]:
        """(Ci, Hi, Wi) per scale, each half the one before, rounded up.

        Called before a solve, so the implementation of f is loaded here. Otherwise the first solve
        of a process, as after a resume, could begin with other arithmetic than the following ones.
        """
        resolve(self.norm_kernel, injection.device)
        h, w = injection.shape[-2:]
        shapes = []
        for c in self.channels:
            shapes.append((c, h, w))
            h, w = (h + 1) // 2, (w + 1) // 2
        return shapes
