"""Official-format networks, written down a second time: straight functions of a state dict.

Nothing here comes from ``mdeq_mm``, so that agreement with it means something.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Dict, List, Mapping, Sequence

import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope, Registry
from mmpretrain.registry import MODELS as CLASSIFIERS
from mmseg.registry import MODELS as SEGMENTORS
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]


def random_checkpoint(
    channels: Sequence[int],
    expansion: int = 2,
    head_channels: Sequence[int] = (),
    out_channels: int = 20,
    num_classes: int = 5,
    injection: bool = False,
    segmentation: bool = False,
    seed: int = 0,
) -> 'OrderedDict[str, Tensor]':
    """Weights under official names in float64, weight-normed, with a contraction for f."""
    gen = torch.Generator().manual_seed(seed)
    state: 'OrderedDict[str, Tensor]' = OrderedDict()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    def conv(name: str, cin: int, cout: int, kernel: int, bias=False, normed=False) -> None:
        weight = draw(cout, cin, kernel, kernel) / (cin * kernel**2) ** 0.5
        if normed:
            state[f'{name}.weight_g'] = 0.5 + draw(cout, 1, 1, 1).abs()
            state[f'{name}.weight_v'] = weight
        else:
            state[f'{name}.weight'] = weight
        if bias:
            state[f'{name}.bias'] = draw(cout)

    def group_norm(name: str, width: int, scale: float) -> None:
        # A shift that outweighs the scale makes f a contraction: the next norm then sees mostly
        # what does not depend on z. Plain iteration finds the equilibrium.
        state[f'{name}.weight'] = scale * (1 + 0.3 * draw(width))
        state[f'{name}.bias'] = draw(width)

    def batch_norm(name: str, width: int, affine: bool = True) -> None:
        if affine:
            state[f'{name}.weight'] = 1 + 0.3 * draw(width)
            state[f'{name}.bias'] = 0.3 * draw(width)
        state[f'{name}.running_mean'] = 0.3 * draw(width)
        state[f'{name}.running_var'] = 0.5 + draw(width).abs()
        state[f'{name}.num_batches_tracked'] = torch.tensor(7)

    scales = range(len(channels))
    conv('downsample.0', 3, channels[0], 3)
    batch_norm('downsample.1', channels[0])
    conv('downsample.3', channels[0], channels[0], 3)
    batch_norm('downsample.4', channels[0])
    if injection:
        conv('stage0.0', channels[0], channels[0], 1)
        batch_norm('stage0.1', channels[0])
    for i in scales:
        block, c = f'fullstage.branches.{i}.blocks.0', channels[i]
        conv(f'{block}.conv1', c, expansion * c, 3, normed=True)
        group_norm(f'{block}.gn1', expansion * c, 1)
        conv(f'{block}.conv2', expansion * c, c, 3, normed=True)
        group_norm(f'{block}.gn2', c, 1)
        group_norm(f'{block}.gn3', c, 0.3)
        for j in scales:
            net = f'fullstage.fuse_layers.{i}.{j}.net'
            if j > i:
                conv(f'{net}.conv', channels[j], c, 1)
                group_norm(f'{net}.gnorm', c, 0.3)
            for k in range(i - j):
                width = c if k == i - j - 1 else channels[j]
                conv(f'{net}.{k}.conv', channels[j], width, 3)
                group_norm(f'{net}.{k}.gnorm', width, 0.3)
        conv(f'fullstage.post_fuse_layers.{i}.conv', c, c, 1, normed=True)
        group_norm(f'fullstage.post_fuse_layers.{i}.gnorm', c, 0.3)

    if segmentation:
        conv('last_layer.0', sum(channels), sum(channels), 1, bias=True)
        batch_norm('last_layer.1', sum(channels))
        conv('last_layer.3', sum(channels), num_classes, 1, bias=True)
        return state
    for i in scales:
        module, width = f'incre_modules.{i}.0', head_channels[i]
        conv(f'{module}.conv1', channels[i], width, 1)
        batch_norm(f'{module}.bn1', width, affine=False)
        conv(f'{module}.conv2', width, width, 3)
        batch_norm(f'{module}.bn2', width, affine=False)
        conv(f'{module}.conv3', width, 4 * width, 1)
        batch_norm(f'{module}.bn3', 4 * width, affine=False)
        conv(f'{module}.downsample.0', channels[i], 4 * width, 1)
        batch_norm(f'{module}.downsample.1', 4 * width)
    for i in scales[:-1]:
        conv(f'downsamp_modules.{i}.0', 4 * head_channels[i], 4 * head_channels[i + 1], 3, True)
        batch_norm(f'downsamp_modules.{i}.1', 4 * head_channels[i + 1])
    conv('final_layer.0', 4 * head_channels[-1], out_channels, 1, bias=True)
    batch_norm('final_layer.1', out_channels)
    state['classifier.weight'] = draw(num_classes, out_channels)
    state['classifier.bias'] = draw(num_classes)
    return state


class OfficialNet:
    """The network of an official state dict, step by step, batch norm in evaluation mode.

    Args:
        state (Mapping[str, Tensor]): Official names, without prefixes; plain weights or g and v.
        channels (Sequence[int]): Channels per scale.
        num_groups (int): Groups of the group norms.
        strides (Sequence[int]): Of the stem.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        channels: Sequence[int],
        num_groups: int,
        strides: Sequence[int],
    ) -> None:
        self.state, self.channels = state, channels
        self.num_groups, self.strides = num_groups, strides

    def _weight(self, name: str) -> Tensor:
        if f'{name}.weight' in self.state:
            return self.state[f'{name}.weight']
        g, v = self.state[f'{name}.weight_g'], self.state[f'{name}.weight_v']
        return g * v / v.pow(2).sum(dim=(1, 2, 3), keepdim=True).sqrt()

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self._weight(name)
        bias = self.state.get(f'{name}.bias')
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2)

    def _gn(self, x: Tensor, name: str, groups: int) -> Tensor:
        weight, bias = self.state.get(f'{name}.weight'), self.state.get(f'{name}.bias')
        return F.group_norm(x, groups, weight, bias)

    def _bn(self, x: Tensor, name: str) -> Tensor:
        s = self.state
        weight, bias = s.get(f'{name}.weight'), s.get(f'{name}.bias')
        return F.batch_norm(
            x, s[f'{name}.running_mean'], s[f'{name}.running_var'], weight, bias, training=False
        )

    def inject(self, image: Tensor) -> Tensor:
        x = F.relu(self._bn(self._conv(image, 'downsample.0', self.strides[0]), 'downsample.1'))
        x = F.relu(self._bn(self._conv(x, 'downsample.3', self.strides[1]), 'downsample.4'))
        if 'stage0.0.weight' in self.state:
            x = F.relu(self._bn(self._conv(x, 'stage0.0'), 'stage0.1'))
        return x

    def zeros(self, x: Tensor) -> List[Tensor]:
        n, _, h, w = x.shape
        return [x.new_zeros(n, c, h >> i, w >> i) for i, c in enumerate(self.channels)]

    def f(self, z: Sequence[Tensor], x: Tensor) -> List[Tensor]:
        groups, blocks = self.num_groups, []
        for i, zi in enumerate(z):
            name = f'fullstage.branches.{i}.blocks.0'
            out = F.relu(self._gn(self._conv(zi, f'{name}.conv1'), f'{name}.gn1', groups))
            out = self._conv(out, f'{name}.conv2')
            out = out + x if i == 0 else out
            out = F.relu(self._gn(out, f'{name}.gn2', groups) + zi)
            blocks.append(self._gn(out, f'{name}.gn3', groups))
        result = []
        for i, total in enumerate(blocks):
            for j, term in enumerate(blocks):
                net = f'fullstage.fuse_layers.{i}.{j}.net'
                if j < i:
                    for k in range(i - j):
                        term = F.relu(term) if k else term
                        term = self._conv(term, f'{net}.{k}.conv', 2)
                        term = self._gn(term, f'{net}.{k}.gnorm', groups)
                elif j > i:
                    term = self._gn(self._conv(term, f'{net}.conv'), f'{net}.gnorm', groups)
                    term = F.interpolate(term, scale_factor=2 ** (j - i), mode='nearest')
                total = total + term if j != i else total
            name = f'fullstage.post_fuse_layers.{i}'
            out = self._conv(F.relu(total), f'{name}.conv')
            result.append(self._gn(out, f'{name}.gnorm', groups // 2))
        return result

    def iterate(self, image: Tensor, steps: int) -> List[Tensor]:
        """``steps`` applications of f to zero, with whatever graph the weights ask for."""
        x = self.inject(image)
        z = self.zeros(x)
        for _ in range(steps):
            z = self.f(z, x)
        return z

    def logits(self, z: Sequence[Tensor]) -> Tensor:
        if 'last_layer.0.weight' in self.state:
            size = z[0].shape[-2:]
            maps = [F.interpolate(a, size, mode='bilinear', align_corners=True) for a in z]
            out = self._conv(torch.cat(maps, dim=1), 'last_layer.0')
            return self._conv(F.relu(self._bn(out, 'last_layer.1')), 'last_layer.3')
        total = None
        for i, zi in enumerate(z):
            name = f'incre_modules.{i}.0'
            out = F.relu(self._bn(self._conv(zi, f'{name}.conv1'), f'{name}.bn1'))
            out = F.relu(self._bn(self._conv(out, f'{name}.conv2'), f'{name}.bn2'))
            out = self._bn(self._conv(out, f'{name}.conv3'), f'{name}.bn3')
            skip = self._bn(self._conv(zi, f'{name}.downsample.0'), f'{name}.downsample.1')
            out = F.relu(out + skip)
            if i:
                name = f'downsamp_modules.{i - 1}'
                out = out + F.relu(self._bn(self._conv(total, f'{name}.0', 2), f'{name}.1'))
            total = out
        total = F.relu(self._bn(self._conv(total, 'final_layer.0'), 'final_layer.1'))
        return F.linear(
            total.mean(dim=(2, 3)), self.state['classifier.weight'], self.state['classifier.bias']
        )


def backbone_cfg(channels, expansion, strides, num_groups, solver, gradient_solver=None) -> Dict:
    return dict(
        type='MDEQBackbone',
        channels=channels,
        expansion=expansion,
        stem_strides=strides,
        norm_cfg=dict(type='GN', num_groups=num_groups),
        solver=solver,
        gradient=dict(type='ImplicitGradient', solver=gradient_solver or solver),
    )


def _build(registry: Registry, scope: str, cfg: Dict) -> nn.Module:
    # Whatever scope an earlier Runner of the process left as the default.
    with DefaultScope.overwrite_default_scope(scope):
        return registry.build(cfg).eval()


def build_classifier(backbone: Dict, head_channels, out_channels: int, classes: int) -> nn.Module:
    return _build(
        CLASSIFIERS,
        'mmpretrain',
        dict(
            type='ImageClassifier',
            backbone=backbone,
            neck=[
                dict(
                    type='MDEQFuseNeck',
                    in_channels=backbone['channels'],
                    head_channels=head_channels,
                    out_channels=out_channels,
                ),
                dict(type='GlobalAveragePooling'),
            ],
            head=dict(type='LinearClsHead', num_classes=classes, in_channels=out_channels),
        ),
    )


def build_segmentor(backbone: Dict, classes: int) -> nn.Module:
    channels = backbone['channels']
    return _build(
        SEGMENTORS,
        'mmseg',
        dict(
            type='EncoderDecoder',
            backbone=backbone,
            decode_head=dict(
                type='FCNHead',
                in_channels=list(channels),
                in_index=list(range(len(channels))),
                input_transform='resize_concat',
                channels=sum(channels),
                kernel_size=1,
                num_convs=1,
                concat_input=False,
                align_corners=True,
                num_classes=classes,
                norm_cfg=dict(type='BN'),
            ),
        ),
    )
