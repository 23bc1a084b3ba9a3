"""Convert an official MDEQ checkpoint into one that loads strictly into a model of ``mdeq_mm``.

Usage::

    python tools/model_converters/mdeq_to_mm.py SRC DST [--backbone-only]

Classification files become checkpoints of ``ImageClassifier`` with ``MDEQFuseNeck``,
segmentation files checkpoints of ``EncoderDecoder`` with ``FCNHead``, both on ``MDEQBackbone``.
The result computes the same function as the official network.
"""

import argparse
import os
import pickle
import re
import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from mdeq_mm.compat import UnsafeCheckpointError, verify_checkpoint
from mdeq_mm.models import MDEQBackbone, MDEQFuseNeck

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

# Official module -> module here; {i} and {j} stand for numbers. Read in both directions: forward
# to convert, backward to name a missing key as the official file should have it.
RULES: Tuple[Tuple[str, str], ...] = (
    ('downsample.0', 'backbone.stem.0.conv'),
    ('downsample.1', 'backbone.stem.0.bn'),
    ('downsample.3', 'backbone.stem.1.conv'),
    ('downsample.4', 'backbone.stem.1.bn'),
    ('stage0.0', 'backbone.injection.conv'),
    ('stage0.1', 'backbone.injection.bn'),
    ('fullstage.branches.{i}.blocks.0.conv{j}', 'backbone.cell.blocks.{i}.conv{j}'),
    ('fullstage.branches.{i}.blocks.0.gn{j}', 'backbone.cell.blocks.{i}.norm{j}'),
    ('fullstage.fuse_layers.{i}.{j}.net.conv', 'backbone.cell.fusions.{i}.sources.{j}.conv'),
    ('fullstage.fuse_layers.{i}.{j}.net.gnorm', 'backbone.cell.fusions.{i}.sources.{j}.norm'),
    # A downward path is one flat sequence here: convolution, norm, ReLU of each halving.
    *(
        (
            f'fullstage.fuse_layers.{{i}}.{{j}}.net.{step}.{layer}',
            f'backbone.cell.fusions.{{i}}.sources.{{j}}.{3 * step + offset}',
        )
        for step in range(8)
        for offset, layer in enumerate(('conv', 'gnorm'))
    ),
    ('fullstage.post_fuse_layers.{i}.conv', 'backbone.cell.fusions.{i}.conv'),
    ('fullstage.post_fuse_layers.{i}.gnorm', 'backbone.cell.fusions.{i}.norm'),
    ('incre_modules.{i}.0.conv{j}', 'neck.0.bottlenecks.{i}.conv{j}.conv'),
    ('incre_modules.{i}.0.bn{j}', 'neck.0.bottlenecks.{i}.conv{j}.bn'),
    ('incre_modules.{i}.0.downsample.0', 'neck.0.bottlenecks.{i}.project.conv'),
    ('incre_modules.{i}.0.downsample.1', 'neck.0.bottlenecks.{i}.project.bn'),
    ('downsamp_modules.{i}.{j}', 'neck.0.downsamples.{i}.{j}'),
    ('final_layer.{i}', 'neck.0.final.{i}'),
    ('classifier', 'head.fc'),
    ('last_layer.0', 'decode_head.convs.0.conv'),
    ('last_layer.1', 'decode_head.convs.0.bn'),
    ('last_layer.3', 'decode_head.conv_seg'),
)

_NORM = 'parametrizations.weight.original0'
_DIRECTION = 'parametrizations.weight.original1'
_LEAVES = {'weight_g': _NORM, 'weight_v': _DIRECTION}
_KEY = re.compile(
    r'(.+?)\.(parametrizations\.weight\.original[01]|weight_[gv]|weight|bias|running_mean|'
    r'running_var|num_batches_tracked)'
)
# Wrappers such as DataParallel put these in front, one or several times.
_PREFIX = re.compile(r'^(?:(?:module|model)\.)+')
# f again, as the official solvers hold it.
_DUPLICATE = re.compile(r'^(?:full_?stage_copy|deq)\.')
# Class weights of the segmentation trainer's loss, which its wrapped model saves.
_NOT_NETWORK = re.compile(r'^loss\.criterion\.weight$')
_AFFINE = re.compile(
    r'fullstage\.(branches|fuse_layers|post_fuse_layers)\..*\.(gn\d|gnorm)\.(?:weight|bias)'
)
_SCALE = re.compile(r'backbone\.cell\.(?:blocks|fusions)\.(\d+)\.')
_WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'net', 'network')


class ConversionError(ValueError):
    """The file is not a complete official MDEQ checkpoint.

    Args:
        reason (str): One line.
        **lists: Keys by kind of problem, e.g. ``unmatched=[...]``; empty lists are left out.
    """

    def __init__(self, reason: str, **lists: Sequence[str]) -> None:
        self.lists = {kind: list(keys) for kind, keys in lists.items() if keys}
        lines = [reason]
        for kind, keys in self.lists.items():
            lines.append(f'{len(keys)} {kind}:')
            lines += [f'  {key}' for key in keys]
        super().__init__('\n'.join(lines))


@dataclass
class Report:
    """What a conversion did, in numbers of tensors.

    Attributes:
        read, written: Tensors in the source and in the result.
        parameters: Numbers in the trainable ones of the result.
        duplicates: Copies of f, dropped.
        ignored: Tensors that belong to no network (loss weights), dropped.
        heads: Tensors of heads, dropped under ``backbone_only``.
        folded: Biases folded into the batch norm behind them.
        split, composed: Weights brought from plain to weight-normalized form, and back.
        defaults: Values that the source lacks and that were filled in, by kind.
        task: ``'classification'``, ``'segmentation'`` or ``'backbone'``.
        architecture: Options the matching model takes.
    """

    read: int = 0
    written: int = 0
    parameters: int = 0
    duplicates: int = 0
    ignored: int = 0
    heads: int = 0
    folded: int = 0
    split: int = 0
    composed: int = 0
    defaults: Counter = field(default_factory=Counter)
    task: str = 'backbone'
    architecture: Dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ', '.join(f'{key}={value}' for key, value in self.architecture.items())
        filled = ', '.join(f'{n} {kind}' for kind, n in self.defaults.items())
        lines = [
            f'{self.task}: {options}',
            f'tensors read: {self.read}',
            f'dropped: {self.duplicates} duplicates, {self.heads} of heads, '
            f'{self.ignored} of losses',
            f'folded biases: {self.folded}',
            f'weights split into norm and direction: {self.split}, composed: {self.composed}',
            f'filled defaults: {sum(self.defaults.values())}' + (f' ({filled})' if filled else ''),
            f'tensors written: {self.written}',
            f'parameters: {self.parameters:,}',
        ]
        return '\n'.join(lines)


def _compiled(pairs: Sequence[Tuple[str, str]]) -> List[Tuple['re.Pattern', str]]:
    """Templates on the left as regular expressions with a group per placeholder."""

    def pattern(template: str) -> 're.Pattern':
        return re.compile(re.sub(r'\\\{(\w)\\\}', r'(?P<\1>\\d+)', re.escape(template)))

    return [(pattern(source), target) for source, target in pairs]


_FORWARD = _compiled(RULES)
_BACKWARD = _compiled([(target, source) for source, target in RULES])


def _translate(
    key: str, rules: Sequence[Tuple['re.Pattern', str]], leaves: Mapping[str, str]
) -> Optional[str]:
    """``key`` under the other naming, None where no rule covers it."""
    parts = _KEY.fullmatch(key)
    if parts is None:
        return None
    module, leaf = parts.groups()
    for pattern, template in rules:
        match = pattern.fullmatch(module)
        if match:
            return f'{template.format(**match.groupdict())}.{leaves.get(leaf, leaf)}'
    return None


def mm_name(key: str) -> Optional[str]:
    """The name here of an official key without prefix, None where it has none."""
    return _translate(re.sub(r'^full_stage\.', 'fullstage.', key), _FORWARD, _LEAVES)


def official_name(key: str) -> str:
    """The name an official file has for a key written here."""
    return _translate(key, _BACKWARD, {v: k for k, v in _LEAVES.items()}) or key


def convert(
    state_dict: Mapping[str, Tensor], backbone_only: bool = False
) -> Tuple['OrderedDict[str, Tensor]', Report]:
    """Official state dict -> state dict of the matching model here.

    Args:
        state_dict (Mapping[str, Tensor]): Official names, prefixes and duplicates included.
        backbone_only (bool): Leave the heads out; a source without any is then complete.

    Returns:
        tuple: The converted state dict, of clones, and the :class:`Report`.

    Raises:
        ConversionError: A key without a counterpart, or a network that is not complete.
    """
    report = Report(read=len(state_dict))
    tensors, problems = _renamed(state_dict, report)
    if not any(key.startswith('backbone.cell.blocks.') for key in tensors):
        raise ConversionError('no MDEQ found: there is no residual block of f.', **problems)
    if backbone_only:
        heads = [key for key in tensors if not key.startswith('backbone.')]
        report.heads = len(heads)
        for key in heads:
            del tensors[key]
    else:
        report.task = _task(tensors, problems)
    report.architecture = _architecture(tensors, report.task)
    skeleton = _skeleton(report.task, report.architecture)
    expected = skeleton.state_dict()
    _fold_bias(tensors, report)
    _match_weight_forms(tensors, expected, report)
    _fill_defaults(tensors, expected, report)
    _check(tensors, expected, problems)
    converted = OrderedDict((key, tensors[key].detach().clone().contiguous()) for key in expected)
    report.written = len(converted)
    report.parameters = sum(converted[key].numel() for key, _ in skeleton.named_parameters())
    return converted, report


def _renamed(
    state_dict: Mapping[str, Tensor], report: Report
) -> Tuple[Dict[str, Tensor], Dict[str, List[str]]]:
    """The network's tensors under their new names, and the keys with problems."""
    tensors: Dict[str, Tensor] = {}
    unmatched, conflicting = [], []
    for key, value in state_dict.items():
        name = _PREFIX.sub('', key)
        if _DUPLICATE.match(name):
            report.duplicates += 1
            continue
        if _NOT_NETWORK.match(name):
            report.ignored += 1
            continue
        target = mm_name(name)
        if target is None or not isinstance(value, Tensor):
            unmatched.append(key)
        elif target not in tensors:
            tensors[target] = value
        elif tensors[target].dtype == value.dtype and torch.equal(tensors[target], value):
            report.duplicates += 1
        else:
            conflicting.append(key)
    return tensors, {'unmatched': unmatched, 'in conflict with another key': conflicting}


def _task(tensors: Mapping[str, Tensor], problems: Mapping[str, List[str]]) -> str:
    """Which head the file carries."""
    classification = [k for k in tensors if k.startswith(('neck.', 'head.'))]
    segmentation = [k for k in tensors if k.startswith('decode_head.')]
    if bool(classification) == bool(segmentation):
        what = 'both a classification and a segmentation head' if segmentation else 'no head'
        raise ConversionError(
            f'the file has {what}; convert its backbone alone with --backbone-only.', **problems
        )
    return 'classification' if classification else 'segmentation'


def _size(tensors: Mapping[str, Tensor], module: str, dim: int = 0) -> int:
    """Length of a weight's dimension; 1 if the weight is missing, which is reported later."""
    for leaf in ('weight', _DIRECTION):
        weight = tensors.get(f'{module}.{leaf}')
        if weight is not None and weight.dim() > dim:
            return max(1, weight.shape[dim])
    return 1


def _architecture(tensors: Mapping[str, Tensor], task: str) -> Dict[str, Any]:
    """Options of the model, from the shapes."""
    scales = len({match.group(1) for match in map(_SCALE.match, tensors) if match})
    if scales == 1 and not any('.sources.' in key for key in tensors):
        raise ConversionError(
            'the network has one scale; official networks of one scale apply no fusion although '
            'they store its weights, and the models here do, so this is another function.'
        )
    channels = [_size(tensors, f'backbone.cell.blocks.{i}.conv2') for i in range(scales)]
    options = dict(
        in_channels=_size(tensors, 'backbone.stem.0.conv', 1),
        channels=channels,
        expansion=max(1, _size(tensors, 'backbone.cell.blocks.0.conv1') // channels[0]),
        injection=any(key.startswith('backbone.injection.') for key in tensors),
    )
    if task == 'classification':
        options['head_channels'] = [
            _size(tensors, f'neck.0.bottlenecks.{i}.conv1.conv') for i in range(scales)
        ]
        options['out_channels'] = _size(tensors, 'neck.0.final.0')
        options['num_classes'] = _size(tensors, 'head.fc')
    elif task == 'segmentation':
        options['num_classes'] = _size(tensors, 'decode_head.conv_seg')
    return options


def _skeleton(task: str, architecture: Mapping[str, Any]) -> nn.Module:
    """A model of the architecture with the names and shapes MM's own would have, without data."""
    channels, norm_cfg = architecture['channels'], dict(type='BN')
    parts: Dict[str, nn.Module] = {}
    with torch.device('meta'):
        parts['backbone'] = MDEQBackbone(
            in_channels=architecture['in_channels'],
            channels=channels,
            expansion=architecture['expansion'],
            # The weights show neither the stem's strides nor the number of groups, but the
            # injection is absent only in small nets of full resolution.
            stem_strides=(2, 2) if architecture['injection'] else (1, 1),
            norm_cfg=dict(type='GN', num_groups=1),
        )
        if task == 'classification':
            width = architecture['out_channels']
            parts['neck'] = nn.Sequential(
                MDEQFuseNeck(channels, architecture['head_channels'], width)
            )
            parts['head'] = nn.ModuleDict({'fc': nn.Linear(width, architecture['num_classes'])})
        elif task == 'segmentation':
            width = sum(channels)
            convs = nn.Sequential(ConvModule(width, width, 1, norm_cfg=norm_cfg))
            seg = nn.Conv2d(width, architecture['num_classes'], 1)
            parts['decode_head'] = nn.ModuleDict({'convs': convs, 'conv_seg': seg})
        return nn.ModuleDict(parts)


def _fold_bias(tensors: Dict[str, Tensor], report: Report) -> None:
    """Move the bias of the segmentation head's first convolution into its batch norm.

    ``FCNHead`` has no such bias. Batch norm subtracts the mean, so (x + b) - m = x - (m - b).
    """
    bias_key, mean_key = 'decode_head.convs.0.conv.bias', 'decode_head.convs.0.bn.running_mean'
    bias, mean = tensors.get(bias_key), tensors.get(mean_key)
    if bias is not None and mean is not None and bias.shape == mean.shape:
        tensors[mean_key] = mean - tensors.pop(bias_key)
        report.folded += 1


def _compose(norm: Tensor, direction: Tensor) -> Tensor:
    """``norm * direction / |direction|`` per output channel, in double precision inside."""
    v = direction.double()
    length = torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, *[1] * (v.dim() - 1))
    return (v * (norm.double().reshape(length.shape) / length)).to(direction.dtype)


def _decompose(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Norm (C, 1, 1, 1) and direction of a plain weight."""
    norm = torch.linalg.vector_norm(weight.double().flatten(1), dim=1).to(weight.dtype)
    norm = norm.view(-1, *[1] * (weight.dim() - 1))
    # A channel of zeros has no direction; any direction with norm 0 is right.
    return norm, torch.where(norm > 0, weight, torch.ones_like(weight))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6)


def _match_weight_forms(
    tensors: Dict[str, Tensor], expected: Mapping[str, Tensor], report: Report
) -> None:
    """Bring each weight to the form, plain or weight-normalized, that the model has."""
    modules = {_KEY.fullmatch(key).group(1) for key in tensors}
    for module in sorted(modules):
        plain, norm, direction = (f'{module}.{leaf}' for leaf in ('weight', _NORM, _DIRECTION))
        pair = norm in tensors and direction in tensors and tensors[direction].dim() > 1
        if pair and tensors[norm].numel() == tensors[direction].shape[0]:
            composed = _compose(tensors[norm], tensors[direction])
            if plain in tensors and _close(tensors[plain], composed):
                # The product of the two, stored beside them.
                del tensors[plain]
                report.duplicates += 1
            if plain in expected and plain not in tensors:
                del tensors[norm], tensors[direction]
                tensors[plain] = composed
                report.composed += 1
            else:
                tensors[norm] = tensors[norm].reshape(-1, *[1] * (composed.dim() - 1))
        elif (
            norm in expected
            and norm not in tensors
            and direction not in tensors
            and plain in tensors
            and tensors[plain].dim() > 1
        ):
            tensors[norm], tensors[direction] = _decompose(tensors.pop(plain))
            report.split += 1


def _fill_defaults(
    tensors: Dict[str, Tensor], expected: Mapping[str, Tensor], report: Report
) -> None:
    """Add what a complete official file may lack: BN counters, and the affine of group norms.

    Official options drop the affine of all norms in one role at once; where only some of a role
    are absent the file is damaged, and nothing is filled.
    """
    roles: Dict[Tuple[str, ...], List[str]] = {}
    for key in expected:
        match = _AFFINE.fullmatch(official_name(key))
        if match:
            roles.setdefault(match.groups(), []).append(key)
        elif key.endswith('.num_batches_tracked') and key not in tensors:
            tensors[key] = torch.zeros((), dtype=torch.long)
            report.defaults['num_batches_tracked'] += 1
    dtype = next(value.dtype for value in tensors.values() if value.is_floating_point())
    for keys in roles.values():
        if any(key in tensors for key in keys):
            continue
        for key in keys:
            fill = torch.ones if key.endswith('.weight') else torch.zeros
            tensors[key] = fill(expected[key].shape, dtype=dtype)
            report.defaults['group norm affine'] += 1


def _check(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    problems: Mapping[str, List[str]],
) -> None:
    """Raise unless names and shapes are those of ``expected`` and there were no ``problems``."""
    missing = [official_name(key) for key in expected if key not in tensors]
    surplus = [official_name(key) for key in tensors if key not in expected]
    wrong = []
    # While keys are missing, some expected shapes are guesses.
    for key in () if missing else expected:
        got, want = tuple(tensors[key].shape), tuple(expected[key].shape)
        if got != want:
            wrong.append(f'{official_name(key)}: {got}, expected {want}')
    if missing or surplus or wrong or any(problems.values()):
        raise ConversionError(
            'the file is not a complete official MDEQ checkpoint.',
            **problems,
            missing=missing,
            surplus=surplus,
            **{'of wrong shape': wrong},
        )


def load_official(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file. No code in the file is run."""
    try:
        content = verify_checkpoint(str(path))
    except (OSError, ValueError, UnsafeCheckpointError) as error:
        reason = str(error)
        if isinstance(error.__cause__, pickle.UnpicklingError):
            # torch's own message recommends to load it anyway.
            reason = (
                f'{str(path)!r} was refused: it is not a file of tensors as torch.save writes it, '
                'and a pickle of anything else can run code. Nothing in it was run.'
            )
        raise ConversionError(reason) from error
    return _unwrapped(content)


def _unwrapped(content: Any) -> Mapping[str, Tensor]:
    """The state dict inside the dict that a training script saves."""
    while isinstance(content, Mapping):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            return content
        content = inner[0]
    raise ConversionError(f'the file holds a {type(content).__name__}, not a state dict.')


def save(path: Path, state_dict: Mapping[str, Tensor], report: Report) -> None:
    """Write the checkpoint in one step: ``path`` is either the old file or the complete new one."""
    meta = dict(task=report.task, mdeq=dict(report.architecture))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        torch.save(dict(state_dict=state_dict, meta=meta), scratch)
        os.replace(scratch, path)
    finally:
        if scratch.exists():
            scratch.unlink()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description='Convert an official MDEQ checkpoint.')
    parser.add_argument('src', metavar='SRC', type=Path, help='official checkpoint')
    parser.add_argument('dst', metavar='DST', type=Path, help='file to write')
    parser.add_argument(
        '--backbone-only',
        action='store_true',
        help="leave the heads out; for init_cfg=dict(type='Pretrained', checkpoint=DST, "
        "prefix='backbone.')",
    )
    args = parser.parse_args(argv)
    try:
        converted, report = convert(load_official(args.src), args.backbone_only)
        save(args.dst, converted, report)
    except (ConversionError, OSError) as error:
        print(f'error: {error}\nNothing was written.', file=sys.stderr)
        return 1
    print(f'{report}\nwrote {args.dst}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
