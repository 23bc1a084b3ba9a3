"""The converter: every key style, the same function, and no output file after an error."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch.nn.utils import parametrize

import mdeq_mm  # noqa: F401
from tools.model_converters import mdeq_to_mm as converter

from ..checks import assert_same, assert_says
from ..processes import run_python
from .official import (
    OfficialNet,
    backbone_cfg,
    build_classifier,
    build_segmentor,
    random_checkpoint,
)

SOLVER = dict(type='FixedPointIteration', max_iter=2)
TASKS = ('classification', 'segmentation')
CHANNELS = dict(classification=(8, 16), segmentation=(8, 8, 16, 24))
STRIDES = dict(classification=(1, 1), segmentation=(2, 2))


def official_state(task):
    if task == 'classification':
        return random_checkpoint(CHANNELS[task], head_channels=(4, 6))
    return random_checkpoint(CHANNELS[task], injection=True, segmentation=True)


def build(task):
    cfg = backbone_cfg(CHANNELS[task], 2, STRIDES[task], 4, SOLVER)
    if task == 'classification':
        return build_classifier(cfg, (4, 6), 20, 5).double()
    return build_segmentor(cfg, 5).double()


def plain_weights(state):
    """Weight-normed pairs as the plain weights they stand for."""
    net, result = OfficialNet(state, (), 1, ()), {}
    for key, value in state.items():
        if key.endswith('weight_g'):
            result[key[:-2]] = net._weight(key[: -len('.weight_g')])
        elif not key.endswith('weight_v'):
            result[key] = value
    return result


def split_weights(state, within):
    """Plain convolution weights as pairs of norm and direction."""
    result = {}
    for key, value in state.items():
        if within in key and key.endswith('.conv.weight'):
            result[f'{key}_g'] = value.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            result[f'{key}_v'] = 3 * value
        else:
            result[key] = value
    return result


def with_duplicates(state):
    copies = {}
    for key, value in state.items():
        name = key.partition('.')[2]
        if key.startswith('fullstage.'):
            copies[f'deq.func.{name}'] = value
    for key, value in plain_weights(state).items():
        if key.startswith('fullstage.'):
            name = key.partition('.')[2]
            copies[f'fullstage_copy.{name}'] = value + 1
            copies[f'deq.func_copy.{name}'] = value + 1
    return {**state, **copies}


def new_style(key):
    return key.replace('weight_g', 'parametrizations.weight.original0').replace(
        'weight_v', 'parametrizations.weight.original1'
    )


STYLES = dict(
    plain_names=dict,
    module_prefix=lambda s: {f'module.{k}': v for k, v in s.items()},
    nested_prefix=lambda s: {f'module.model.module.{k}': v for k, v in s.items()},
    duplicates=with_duplicates,
    duplicates_and_prefix=lambda s: {f'model.{k}': v for k, v in with_duplicates(s).items()},
    torchdeq=lambda s: {k.replace('fullstage.', 'full_stage.'): v for k, v in s.items()},
    parametrizations=lambda s: {new_style(k): v for k, v in s.items()},
    no_weight_norm=plain_weights,
    fusions_weight_normed=lambda s: split_weights(s, '.fuse_layers.'),
    product_beside_factors=lambda s: {**s, **plain_weights(s)},
    no_counters=lambda s: {k: v for k, v in s.items() if 'num_batches' not in k},
    loss_weights=lambda s: {**s, 'loss.criterion.weight': torch.ones(5)},
)


def assert_same_function(state, model, task):
    """f(0), f(z) and the logits of a given z, against the official network."""
    net = OfficialNet(state, CHANNELS[task], 4, STRIDES[task])
    image = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        x = net.inject(image)
        injection = model.backbone.injection(model.backbone.stem(image))
        torch.testing.assert_close(injection, x, rtol=1e-10, atol=1e-10)
        zero = net.zeros(x)
        for z in (zero, [torch.randn_like(a) for a in zero]):
            got, want = model.backbone.cell(z, x), net.f(z, x)
            torch.testing.assert_close(list(got), want, rtol=1e-10, atol=1e-10)
        if task == 'classification':
            logits = model.head(model.neck(tuple(z)))
        else:
            logits = model.decode_head(tuple(z))
        torch.testing.assert_close(logits, net.logits(z), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('style', STYLES)
def test_every_key_style_gives_the_same_function(style, task):
    state = official_state(task)
    source = STYLES[style](state)
    converted, report = converter.convert(source)
    model = build(task)
    model.load_state_dict(converted, strict=True)
    assert_same_function(state, model, task)

    assert report.task == task
    assert report.read == len(source)
    assert report.written == len(model.state_dict())
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.folded == (task == 'segmentation')
    copies = sum(any(word in k for word in ('fullstage_copy.', 'deq.')) for k in source)
    normed = sum(k.endswith('weight_g') for k in state)
    assert report.duplicates == (normed if style == 'product_beside_factors' else copies)
    assert report.split == (normed if style == 'no_weight_norm' else 0)
    fusions = sum('fuse_layers' in k and 'post' not in k and 'conv' in k for k in state)
    assert report.composed == (fusions if style == 'fusions_weight_normed' else 0)
    counters = sum('num_batches' in k for k in state)
    assert sum(report.defaults.values()) == (counters if style == 'no_counters' else 0)
    assert report.ignored == (style == 'loss_weights')


def test_a_weight_beside_its_factors_that_is_not_their_product_is_named():
    state = official_state('classification')
    name = 'fullstage.branches.0.blocks.0.conv1.weight'
    for factor in (1.0, 1 + 1e-6):
        converter.convert({**state, name: factor * plain_weights(state)[name]})
    with pytest.raises(converter.ConversionError) as error:
        converter.convert({**state, name: 1.01 * plain_weights(state)[name]})
    assert_says(error, [name])


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('role', ['.gn', '.fuse_layers.', '.post_fuse_layers.', ''])
def test_group_norms_without_affine_become_identities(role, task):
    state = official_state(task)
    for key in list(state):
        norm = '.gn' in key and key.startswith('fullstage.')
        if norm and role in key:
            del state[key]
    removed = len(official_state(task)) - len(state)
    converted, report = converter.convert(state)
    model = build(task)
    model.load_state_dict(converted, strict=True)
    assert_same_function(state, model, task)
    assert report.defaults == {'group norm affine': removed}
    assert 'group norm affine' in str(report)


def test_a_plain_weight_with_a_channel_of_zeros_stays_finite():
    state = plain_weights(official_state('classification'))
    state['fullstage.branches.0.blocks.0.conv1.weight'][3] = 0
    model = build('classification')
    model.load_state_dict(converter.convert(state)[0], strict=True)
    assert_same_function(state, model, 'classification')


def test_plain_weights_keep_their_values_in_the_weight_normed_model():
    state = plain_weights(official_state('segmentation'))
    model = build('segmentation')
    model.load_state_dict(converter.convert(state)[0], strict=True)
    conv = model.backbone.cell.blocks[2].conv1
    assert parametrize.is_parametrized(conv, 'weight')
    want = state['fullstage.branches.2.blocks.0.conv1.weight']
    torch.testing.assert_close(conv.weight, want, rtol=1e-14, atol=1e-14)


def test_the_result_shares_no_memory_with_the_source():
    state = official_state('classification')
    converted, _ = converter.convert(state)
    before = {key: value.clone() for key, value in converted.items()}
    for value in state.values():
        value.zero_()
    for key, value in before.items():
        assert_same(converted[key], value, key)


def test_names_translate_back():
    for task in TASKS:
        for key in official_state(task):
            assert converter.official_name(converter.mm_name(key)) == key


DAMAGES = dict(
    unmatched=(lambda s: s.update(strange=torch.ones(1)), 'strange'),
    unmatched_step=(
        lambda s: s.update({'fullstage.fuse_layers.0.1.net.relu.alpha': torch.ones(1)}),
        'fullstage.fuse_layers.0.1.net.relu.alpha',
    ),
    surplus=(
        lambda s: s.update({'fullstage.fuse_layers.0.5.net.conv.weight': torch.ones(1)}),
        'fullstage.fuse_layers.0.5.net.conv.weight',
    ),
    missing_direction=(
        lambda s: s.pop('fullstage.post_fuse_layers.1.conv.weight_v'),
        'fullstage.post_fuse_layers.1.conv.weight_v',
    ),
    missing_one_affine=(
        lambda s: s.pop('fullstage.branches.1.blocks.0.gn1.bias'),
        'fullstage.branches.1.blocks.0.gn1.bias',
    ),
    missing_statistics=(lambda s: s.pop('downsample.1.running_var'), 'downsample.1.running_var'),
    missing_width=(
        lambda s: s.pop('fullstage.branches.0.blocks.0.conv2.weight_v'),
        'fullstage.branches.0.blocks.0.conv2.weight_v',
    ),
    wrong_shape=(
        lambda s: s.update({'downsample.3.weight': torch.ones(8, 8, 5, 5)}),
        'downsample.3.weight: (8, 8, 5, 5), expected (8, 8, 3, 3)',
    ),
    conflict=(
        lambda s: s.update({'module.downsample.0.weight': torch.ones(8, 3, 3, 3)}),
        'module.downsample.0.weight',
    ),
    not_a_tensor=(lambda s: s.update({'downsample.0.weight': 3}), 'downsample.0.weight'),
)


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('damage', DAMAGES)
def test_refuses_and_leaves_the_target_alone(damage, task, tmp_path, capsys):
    change, named = DAMAGES[damage]
    state = official_state(task)
    change(state)
    source, target = tmp_path / 'official.pth', tmp_path / 'out' / 'mm.pth'
    torch.save(state, source)
    target.parent.mkdir()
    target.write_text('precious')
    assert converter.main([str(source), str(target)]) == 1
    assert named in capsys.readouterr().err
    assert target.read_text() == 'precious'
    assert [path.name for path in target.parent.iterdir()] == ['mm.pth']


def test_a_missing_head_part_and_all_unmatched_keys_are_listed():
    state = official_state('classification')
    del state['classifier.bias'], state['incre_modules.1.0.bn2.running_mean']
    state['extra.one'] = state['extra.two'] = torch.ones(1)
    with pytest.raises(converter.ConversionError) as caught:
        converter.convert(state)
    assert caught.value.lists == {
        'unmatched': ['extra.one', 'extra.two'],
        'missing': ['incre_modules.1.0.bn2.running_mean', 'classifier.bias'],
    }


def test_a_file_of_another_network_is_refused():
    with pytest.raises(converter.ConversionError, match='no MDEQ found'):
        converter.convert({'conv1.weight': torch.ones(1), 'layer1.0.bn1.bias': torch.ones(1)})


def test_one_scale_is_refused_because_official_ones_skip_the_fusion():
    with pytest.raises(converter.ConversionError, match='one scale'):
        converter.convert(random_checkpoint((8,), head_channels=(4,)))


def test_a_headless_file_converts_as_a_backbone_only():
    state = {
        key: value
        for key, value in official_state('segmentation').items()
        if not key.startswith('last_layer.')
    }
    with pytest.raises(converter.ConversionError, match='--backbone-only'):
        converter.convert(state)
    converted, report = converter.convert(state, backbone_only=True)
    want = {f'backbone.{key}' for key in build('segmentation').backbone.state_dict()}
    assert set(converted) == want
    assert report.task == 'backbone'


@pytest.mark.parametrize('wrap', ['state_dict', 'model', None])
@pytest.mark.parametrize('task', TASKS)
def test_the_command_writes_what_mmengine_loads_strictly(wrap, task, tmp_path, capsys):
    state = official_state(task)
    source, target = tmp_path / 'official.pth', tmp_path / 'new' / 'mm.pth'
    content = state if wrap is None else {'epoch': 3, 'best': np.float64(0.5), wrap: state}
    if wrap == 'state_dict':
        content['model'] = 'mdeq'  # the trainer stores the name of the model there
    torch.save(content, source)
    assert converter.main([str(source), str(target)]) == 0
    printed = capsys.readouterr().out
    assert f'tensors read: {len(state)}' in printed
    assert 'folded biases: ' + ('1' if task == 'segmentation' else '0') in printed
    model = build(task)
    checkpoint = load_checkpoint(model, str(target), strict=True)
    assert checkpoint['meta']['task'] == task
    assert_same_function(state, model, task)


@pytest.mark.parametrize('task', TASKS)
def test_backbone_only_serves_pretrained_initialization(task, tmp_path):
    state = official_state(task)
    source, target = tmp_path / 'official.pth', tmp_path / 'backbone.pth'
    torch.save(state, source)
    assert converter.main([str(source), str(target), '--backbone-only']) == 0
    written = torch.load(target, weights_only=True)['state_dict']
    assert [key for key in written if not key.startswith('backbone.')] == []

    init_cfg = dict(type='Pretrained', checkpoint=str(target), prefix='backbone.')
    cfg = backbone_cfg(CHANNELS[task], 2, STRIDES[task], 4, SOLVER)
    backbone = MODELS.build(dict(cfg, init_cfg=init_cfg)).double()
    backbone.init_weights()
    full = build(task)
    full.load_state_dict(converter.convert(state)[0])
    want = full.backbone.state_dict()
    got = backbone.state_dict()
    assert set(got) == set(want)
    for key, value in got.items():
        torch.testing.assert_close(value, want[key], rtol=1e-6, atol=1e-6)


class _Payload:
    """Unpickled without care, this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('protocol', [None, 2, 4])
def test_a_pickle_with_a_payload_is_refused_unrun(protocol, tmp_path, capsys):
    source, target, mark = tmp_path / 'bad.pkl', tmp_path / 'mm.pth', tmp_path / 'mark'
    if protocol is None:
        torch.save({**official_state('classification'), 'payload': _Payload(mark)}, source)
    else:
        source.write_bytes(pickle.dumps({'payload': _Payload(mark)}, protocol))
    assert converter.main([str(source), str(target)]) == 1
    error = capsys.readouterr().err
    assert 'refused' in error and 'False' not in error
    assert not mark.exists() and not target.exists()


@pytest.mark.parametrize('content', [b'', b'hello', b'PK\x03\x04 cut off'])
def test_an_unreadable_file_is_one_clear_error(content, tmp_path, capsys):
    source, target = tmp_path / 'broken.pth', tmp_path / 'mm.pth'
    source.write_bytes(content)
    assert converter.main([str(source), str(target)]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and 'broken.pth' in error and 'Traceback' not in error
    assert not target.exists()


@pytest.mark.parametrize('content', [[1, 2], torch.ones(3), {'epoch': 1}, {}])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path, capsys):
    source, target = tmp_path / 'list.pth', tmp_path / 'mm.pth'
    torch.save(content, source)
    assert converter.main([str(source), str(target)]) == 1
    assert capsys.readouterr().err.startswith('error: ')
    assert not target.exists()


def test_an_unwritable_target_is_an_error(tmp_path, capsys):
    source, target = tmp_path / 'official.pth', tmp_path / 'folder'
    torch.save(official_state('classification'), source)
    target.mkdir()
    assert converter.main([str(source), str(target)]) == 1
    assert 'folder' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['folder', 'official.pth']


def test_a_missing_source_is_one_line_from_the_command(tmp_path):
    paths = tmp_path / 'none.pth', tmp_path / 'mm.pth'
    done = run_python(converter.__file__, *paths, expect=1)
    message = [line for line in done.stderr.splitlines() if line.startswith('error:')]
    assert len(message) == 1 and str(tmp_path / 'none.pth') in message[0]
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir())
