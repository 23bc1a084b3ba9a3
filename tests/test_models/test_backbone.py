"""The backbone as a member of OpenMMLab: registry, shapes, training, freezing, errors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mdeq_mm import deq
from mdeq_mm.layers import MDEQConv2d
from mdeq_mm.models import MDEQBackbone, MDEQFuseNeck

from ..checks import assert_finite, assert_nonzero, assert_same, assert_says, grads

TINY = dict(type='MDEQBackbone', channels=(8, 16), expansion=2, stem_strides=(2, 1))


def broyden(max_iter=8, **kwargs):
    return dict(type='LimitedMemoryBroyden', max_iter=max_iter, **kwargs)


def tiny(**kwargs):
    torch.manual_seed(0)
    net = MODELS.build({**TINY, **kwargs})
    net.init_weights()
    return net


def contracting(net):
    """Weights under which f contracts without training: the injection outweighs the state."""
    cell = net.cell
    nn.init.constant_(cell.blocks[0].conv2.parametrizations.weight.original0, 0.02)
    nn.init.constant_(cell.fusions[0].sources['1'].norm.weight, 0.1)
    nn.init.constant_(cell.fusions[1].sources['0'][-1].weight, 10.0)
    for fusion in cell.fusions:
        nn.init.constant_(fusion.norm.weight, 0.1)
    return net


@pytest.mark.parametrize('scope', ['mmengine', 'mmseg', 'mmpretrain'])
def test_found_by_its_plain_name_from_every_scope(scope):
    pytest.importorskip(scope)
    import importlib

    registry = importlib.import_module(f'{scope}.registry').MODELS
    with DefaultScope.overwrite_default_scope(scope):
        assert type(registry.build(dict(TINY))) is MDEQBackbone
        assert registry.get('MDEQFuseNeck') is MDEQFuseNeck
        assert registry.get('VariationalDropout2d') is not None


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (7, 5), (2, 1), (1, 1)])
@pytest.mark.parametrize('num_scales', [1, 2, 4])
def test_any_input_size_and_number_of_scales(size, num_scales):
    channels = (8, 16, 8, 24)[:num_scales]
    net = tiny(channels=channels, solver=broyden(3), gradient=dict(type='JacobianFreeGradient'))
    net.eval()
    outs = net(torch.randn(2, 3, *size))
    h, w = (size[0] + 1) // 2, (size[1] + 1) // 2
    assert len(outs) == num_scales
    for out, c in zip(outs, channels):
        assert out.shape == (2, c, h, w)
        assert_finite(out)
        h, w = (h + 1) // 2, (w + 1) // 2


def test_out_indices_choose_the_scales():
    net = tiny(out_indices=(1,)).eval()
    (out,) = net(torch.randn(1, 3, 16, 16))
    assert out.shape == (1, 16, 4, 4)


def test_every_parameter_gets_a_gradient_even_from_one_scale():
    net = tiny(
        out_indices=(1,),
        solver=broyden(6),
        gradient=dict(type='ImplicitGradient', solver=broyden(6)),
    )
    (out,) = net(torch.randn(2, 3, 16, 16))
    (out * torch.randn_like(out)).sum().backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_training_and_evaluation_return_the_same_equilibrium():
    net = tiny(norm_eval=True)
    x = torch.randn(2, 3, 16, 16)
    net.train()
    trained = net(x)
    net.eval()
    with torch.no_grad():
        for a, b in zip(trained, net(x)):
            torch.testing.assert_close(a, b)


def test_output_is_an_equilibrium():
    net = contracting(tiny(solver=broyden(80, tol=1e-9))).double().train()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    outs = net(x)
    injection = net.injection(net.stem(x))
    for z, fz in zip(outs, net.cell(outs, injection)):
        torch.testing.assert_close(z, fz, atol=1e-8, rtol=1e-6)


def test_answer_for_an_image_does_not_depend_on_its_batch():
    net = tiny(solver=broyden(20, tol=1e-3)).double().eval()
    x = torch.randn(8, 3, 12, 20, dtype=torch.float64)
    together = net(x)
    for i in range(8):
        for t, alone in zip(together, net(x[i : i + 1])):
            torch.testing.assert_close(t[i], alone[0], atol=1e-9, rtol=1e-7)


def test_evaluation_goes_on_with_unsolved_images_alone():
    # Blank images have their equilibrium sooner.
    x = (
        torch.randn(4, 3, 16, 16, dtype=torch.float64)
        * torch.tensor([1e-6, 1e-6, 1, 1])[:, None, None, None].double()
    )
    options = dict(solver=broyden(40, tol=1e-6), stem_norm_cfg=dict(type='GN', num_groups=8))
    outs, calls = [], []
    for skip in (False, True):
        net = contracting(tiny(skip_solved=skip, **options)).double().eval()
        sizes = []
        net.cell.register_forward_hook(lambda cell, args, out, s=sizes: s.append(len(out[0])))
        with torch.no_grad():
            outs.append(net(x))
        calls.append(sizes)
    assert set(calls[0]) == {4} and len(calls[1]) == len(calls[0])
    # The call after the solve is for all.
    assert calls[1][-1] == 4 and 1 <= min(calls[1]) <= 2
    for got, wanted in zip(*outs):
        torch.testing.assert_close(got, wanted)


def test_input_gets_a_gradient_in_evaluation():
    net = tiny().eval()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    out = net(x)[0]
    (out * torch.randn_like(out)).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_frozen_net_passes_a_gradient_to_its_input_and_builds_no_graph_without_one():
    net = tiny(frozen_stages=2).train()
    x = torch.randn(1, 3, 8, 8)
    assert [out.requires_grad for out in net(x)] == [False, False]
    out = net(x.requires_grad_())[0]
    (out * torch.randn_like(out)).sum().backward()
    assert_nonzero(x.grad)
    # Stem and injection alone may train as well.
    net = tiny().train()
    net.cell.requires_grad_(False)
    out = net(x.detach())[0]
    (out * torch.randn_like(out)).sum().backward()
    assert_nonzero(grads(net.stem))
    assert [name for name, grad in grads(net.cell).items() if grad is not None] == []


def test_calls_of_f_are_max_iter_and_one():
    net = tiny(solver=broyden(5, tol=0)).eval()
    calls = []
    net.cell.register_forward_hook(lambda *_: calls.append(1))
    net(torch.randn(1, 3, 8, 8))
    assert len(calls) == 6


def test_new_masks_each_training_forward_and_none_in_evaluation():
    net = tiny(drop_rate=0.5, norm_eval=True)
    x = torch.randn(2, 3, 16, 16)
    net.train()
    a, b = net(x)[0], net(x)[0]
    assert not torch.equal(a, b)
    net.eval()
    assert_same(net(x)[0], net(x)[0])


def test_two_forwards_with_dropout_then_two_backwards():
    net = tiny(
        drop_rate=0.5, norm_eval=True, gradient=dict(type='ImplicitGradient', solver=broyden(10))
    )
    x = torch.randn(2, 3, 16, 16)
    params = list(net.parameters())

    def grads(order):
        torch.manual_seed(3)
        losses = [net(x)[0].pow(2).sum(), net(x)[1].pow(3).sum()]
        result = {i: torch.autograd.grad(losses[i], params) for i in order}
        return [*result[0], *result[1]]

    torch.testing.assert_close(grads((0, 1)), grads((1, 0)))


def test_in_place_work_on_an_output_does_not_disturb_the_gradient():
    net = tiny(norm_eval=True)
    x = torch.randn(2, 3, 16, 16)
    params = list(net.parameters())
    expected = torch.autograd.grad(net(x)[0].relu().sum(), params)
    got = torch.autograd.grad(net(x)[0].relu_().sum(), params)
    torch.testing.assert_close(got, expected)


def test_memory_of_a_step_does_not_depend_on_max_iter():
    """Tensors alive after a forward: one call of f, whatever the solver spent."""

    def alive(max_iter):
        net = tiny(
            solver=broyden(max_iter, tol=0, memory=4),
            gradient=dict(type='ImplicitGradient', solver=broyden(max_iter, tol=0, memory=4)),
        )
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            net(torch.randn(2, 3, 32, 32))
        return sum(saved)

    assert alive(10) == alive(40) > 0


def trainable(net):
    return [name for name, parameter in net.named_parameters() if parameter.requires_grad]


def test_frozen_stages_and_norm_eval():
    net = tiny(frozen_stages=0, norm_eval=True).train()
    assert trainable(net) and not [name for name in trainable(net) if name.startswith('stem')]
    assert trainable(net.cell) == [name for name, _ in net.cell.named_parameters()]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and net.cell.training
    whole = tiny(frozen_stages=2).train()
    assert trainable(whole) == []
    for name in ('stem', 'injection', 'cell'):
        assert not getattr(whole, name).training, name


def shaken(net):
    """In evaluation mode, every weight and statistic of its own, in float64."""
    torch.manual_seed(0)
    for name, value in net.double().eval().state_dict().items():
        if value.is_floating_point():
            # Of scale 1 behind each convolution; variances are positive.
            spread = value[0].numel() ** -0.5 if value.dim() > 1 else 1.0
            value.copy_(spread * torch.randn_like(value))
            if name.endswith('running_var'):
                value.abs_().add_(0.5)
    return net


def conv_norm(net, conv, norm, x, stride=1):
    """Convolution and batch norm by the names of a net's weights."""
    state = net.state_dict()
    weight = state[f'{conv}.weight']
    x = F.conv2d(x, weight, state.get(f'{conv}.bias'), stride, padding=weight.shape[-1] // 2)
    parts = ('running_mean', 'running_var', 'weight', 'bias')
    return F.batch_norm(x, *(state.get(f'{norm}.{part}') for part in parts))


@pytest.mark.parametrize('strides', [(1, 1), (2, 1), (2, 2), (2,)])
@pytest.mark.parametrize('channels', [(8, 16), (8, 16, 8)])
def test_stem_and_injection_are_the_formula(channels, strides):
    """Convolution, norm, ReLU for each of the strides, and once more of 1x1 for the injection."""
    net = shaken(tiny(channels=channels, stem_strides=strides))
    x = torch.randn(2, 3, 13, 9, dtype=torch.float64)
    wanted = x
    for i, stride in enumerate(strides):
        names = f'stem.{i}.conv', f'stem.{i}.bn'
        wanted = F.relu(conv_norm(net, *names, wanted, stride))
    if channels == (8, 16, 8) or 2 in strides:
        wanted = F.relu(conv_norm(net, 'injection.conv', 'injection.bn', wanted))
    torch.testing.assert_close(net.problem(x).injection.contiguous(), wanted)
    sizes = {name: value.shape[1:] for name, value in net.named_parameters() if value.dim() == 4}
    assert {name: size for name, size in sizes.items() if name.startswith(('stem', 'inj'))} == {
        'stem.0.conv.weight': (3, 3, 3),
        **{f'stem.{i}.conv.weight': (8, 3, 3) for i in range(1, len(strides))},
        **({'injection.conv.weight': (8, 1, 1)} if (2 in strides or len(channels) > 2) else {}),
    }
    assert [name for name in net.stem.state_dict() if name.endswith('conv.bias')] == []


def test_convolutions_of_the_stem_are_those_that_take_maps_one_pixel_wide():
    convs = [
        part for part in tiny(stem_strides=(2, 2)).stem.modules() if isinstance(part, nn.Conv2d)
    ]
    assert [type(conv) for conv in convs] == [MDEQConv2d] * 2


def test_stem_injection_as_released():
    full = dict(stem_strides=(1, 1), expansion=1)
    assert isinstance(tiny(channels=(8, 8), **full).injection, nn.Identity)
    assert not isinstance(tiny(channels=(8, 8, 8), **full).injection, nn.Identity)
    assert not isinstance(tiny(channels=(8, 8)).injection, nn.Identity)


def test_initialization_reaches_plain_convolutions_only():
    net = tiny(channels=(32, 64))
    path = net.cell.fusions[1].sources['0'][0]
    assert path.weight.std().item() == pytest.approx(0.01, rel=0.1)
    normed = net.cell.blocks[1].conv1
    bound = 1 / (64 * 9) ** 0.5
    assert normed.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
    plain = tiny(channels=(32, 64), weight_norm=False).cell.blocks[1].conv1
    assert plain.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_deepcopy_pickle_and_state_dict_after_a_step():
    net = tiny(drop_rate=0.3)
    net(torch.randn(2, 3, 16, 16))[0].sum().backward()
    x = torch.randn(1, 3, 16, 16)
    net.eval()
    expected = net(x)[0]
    for twin in (copy.deepcopy(net), pickle_roundtrip(net)):
        assert_same(twin(x)[0], expected)
    other = tiny(drop_rate=0.3)
    other.load_state_dict(net.state_dict())
    assert_same(other.eval()(x)[0], expected)


def pickle_roundtrip(net):
    # torch cannot pickle parametrized modules; their state dict is the portable form.
    twin = tiny(drop_rate=0.3).eval()
    twin.load_state_dict(pickle.loads(pickle.dumps(net.state_dict())))
    return twin


def test_autocast_keeps_the_state_in_full_precision():
    net = tiny(norm_eval=True)
    x = torch.randn(2, 3, 16, 16)
    reference = net(x)
    dtypes = set()
    net.cell.register_forward_hook(lambda m, args, out: dtypes.update(o.dtype for o in out))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs = net(x)
    sum(o.float().pow(2).sum() for o in outs).backward()
    assert dtypes == {torch.bfloat16}
    assert [o.dtype for o in outs] == [torch.float32] * 2
    assert_finite(grads(net))
    assert_finite(reference[0])


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(slover=dict(type='Anderson')), ["'slover'", "'solver'", 'expansion']),
        (dict(solver=dict(type='Andersen')), ["'Anderson'", 'LimitedMemoryBroyden']),
        (dict(solver=dict(type='Anderson', memory=0)), ['memory', '>= 1']),
        (dict(solver=dict(type='Anderson', memroy=3)), ["'memory'", 'ridge']),
        (dict(channels=(3, 8)), ['3 channels', '8 groups', '[1, 3]']),
        (dict(channels=()), ['channels']),
        (dict(channels=(8, -1)), ['channels', '-1']),
        (dict(out_indices=(0, 2)), ['MDEQBackbone: out_indices', '0..1', '(0, 2)']),
        (dict(upsample='cubic'), ['nearest', 'bilinear', "'cubic'"]),
        (dict(expansion=0), ['expansion', '>= 1']),
        (dict(drop_rate=1.0), ['drop_rate', '[0, 1)']),
        (dict(frozen_stages=3), ['frozen_stages', '3']),
        (dict(norm_cfg=dict(type='BN')), ['batch statistics', 'GN']),
        (dict(gradient=dict(type='Exact')), ['ImplicitGradient', 'PhantomGradient']),
        (dict(stem_norm_cfg=dict(type='GN', num_groups=3)), ['8 channels', '3 groups']),
        (dict(stem_norm_cfg=dict(type='GN')), ['stem_norm_cfg', 'num_groups=8']),
        (dict(norm_cfg=None), ['norm_cfg', 'None', 'do not converge without']),
        (dict(stem_norm_cfg=None), ['stem_norm_cfg', 'None', 'do not converge without']),
        (dict(out_indices=3), ['out_indices', 'list', '(1,)', 'got 3']),
        (dict(channels=64), ['channels', 'list', '(64,)']),
        (dict(stem_strides=2), ['stem_strides', 'list', '(2,)']),
        (dict(depth=50), ["'depth'", '_delete_=True']),
        (dict(num_stages=4), ["'num_stages'", '_delete_=True']),
        (dict(pretrained='a.pth'), ["'pretrained'", 'model.pretrained=None', 'init_cfg']),
    ],
)
def test_wrong_option_fails_at_construction_naming_the_choices(options, words):
    with pytest.raises((TypeError, ValueError)) as error:
        MODELS.build({**TINY, **options})
    assert_says(error, words)


def test_each_part_of_a_config_reaches_the_implicit_layer():
    net = tiny(
        solver=dict(type='Anderson', max_iter=4),
        eval_solver=dict(max_iter=9),
        gradient=dict(type='TruncatedGradient', steps=2),
        start=dict(type='PreviousStart'),
        regularizer=dict(type='JacobianRegularizer', weight=0.5),
        unrolled_layers=2,
        skip_solved=True,
    )
    implicit = net.implicit
    assert implicit.solver == deq.Anderson(max_iter=4)
    assert implicit.eval_solver == deq.Anderson(max_iter=9)
    assert implicit.gradient == deq.TruncatedGradient(steps=2)
    assert implicit.start == deq.PreviousStart()
    assert implicit.regularizer == deq.JacobianRegularizer(weight=0.5)
    assert (implicit.unrolled_layers, implicit.skip_solved) == (2, True)


def test_options_of_torch_reach_its_optimizer_of_graphs(monkeypatch):
    given = []
    monkeypatch.setattr(torch, 'compile', lambda function, **options: given.append(options))
    for options in (False, True, {}, dict(mode='max-autotune')):
        tiny(compile_cell=options)
    assert given == [{}, {}, dict(mode='max-autotune')]


def test_no_hint_where_nothing_is_near():
    with pytest.raises(TypeError) as error:
        MODELS.build({**TINY, 'with_cp': True})
    assert 'Did you mean' not in str(error.value)


class TestFuseNeck:
    def test_it_is_the_formula(self):
        """Bottlenecks, added from the top down, and the last convolution."""
        neck = shaken(MDEQFuseNeck((8, 16, 8), (2, 4, 3), 20))
        sizes = ((9, 7), (5, 4), (3, 2))
        maps = [torch.randn(2, c, *size, dtype=torch.float64) for c, size in zip((8, 16, 8), sizes)]
        total = None
        for i, x in enumerate(maps):

            def layer(part, x, i=i):
                names = (f'bottlenecks.{i}.{part}.{leaf}' for leaf in ('conv', 'bn'))
                return conv_norm(neck, *names, x)

            out = F.relu(layer('conv2', F.relu(layer('conv1', x))))
            out = F.relu(layer('conv3', out) + layer('project', x))
            if i:
                names = f'downsamples.{i - 1}.0', f'downsamples.{i - 1}.1'
                out = out + F.relu(conv_norm(neck, *names, total, stride=2))
            total = out
        wanted = F.relu(conv_norm(neck, 'final.0', 'final.1', total))
        torch.testing.assert_close(neck(maps)[0], wanted)

    def test_widths_biases_and_norms(self):
        """Bottlenecks have no bias, and norms that learn nothing but that of the projection."""
        neck = MDEQFuseNeck((8, 16), (2, 4), 20)
        shapes = {name: tuple(value.shape) for name, value in neck.named_parameters()}
        wanted = {}
        for i, (c, head) in enumerate(((8, 2), (16, 4))):
            name = f'bottlenecks.{i}'
            wanted[f'{name}.conv1.conv.weight'] = (head, c, 1, 1)
            wanted[f'{name}.conv2.conv.weight'] = (head, head, 3, 3)
            wanted[f'{name}.conv3.conv.weight'] = (4 * head, head, 1, 1)
            wanted[f'{name}.project.conv.weight'] = (4 * head, c, 1, 1)
            for part in ('weight', 'bias'):
                wanted[f'{name}.project.bn.{part}'] = (4 * head,)
        for name, weight in (('downsamples.0', (16, 8, 3, 3)), ('final', (20, 16, 1, 1))):
            wanted[f'{name}.0.weight'] = weight
            for leaf in ('0.bias', '1.weight', '1.bias'):
                wanted[f'{name}.{leaf}'] = weight[:1]
        assert shapes == wanted

    def test_weights_of_its_convolutions_begin_small_and_norms_at_one(self):
        torch.manual_seed(0)
        neck = MDEQFuseNeck((32, 32), (32, 32), 64)
        for parameter in neck.parameters():
            nn.init.constant_(parameter, 7.0)
        neck.init_weights()
        for name, value in neck.named_parameters():
            if value.dim() == 4:
                assert value.std().item() == pytest.approx(0.01, rel=0.1), name
            else:
                wanted = 1 if name.endswith(('bn.weight', '.1.weight')) else 0
                assert_same(value, torch.full_like(value, wanted))

    def test_one_map_at_the_lowest_resolution(self):
        neck = MODELS.build(
            dict(type='MDEQFuseNeck', in_channels=(8, 16), head_channels=(2, 4), out_channels=20)
        )
        (out,) = neck([torch.randn(2, 8, 9, 7), torch.randn(2, 16, 5, 4)])
        assert out.shape == (2, 20, 5, 4)

    def test_single_scale(self):
        neck = MDEQFuseNeck((8,), (2,), 20)
        assert neck([torch.randn(2, 8, 9, 7)])[0].shape == (2, 20, 9, 7)

    def test_every_scale_reaches_the_output(self):
        neck = MDEQFuseNeck((8, 8, 8), (2, 2, 2), 5).eval()
        maps = [torch.randn(1, 8, s, s, requires_grad=True) for s in (8, 4, 2)]
        neck(maps)[0].sum().backward()
        assert_nonzero([m.grad for m in maps])

    def test_scale_counts_that_disagree_are_named(self):
        with pytest.raises(ValueError, match='one entry a scale'):
            MDEQFuseNeck((8, 16), (2,), 20)
        with pytest.raises(ValueError, match='2 scales and got 1'):
            MDEQFuseNeck((8, 16), (2, 4), 20)([torch.randn(1, 8, 4, 4)])
