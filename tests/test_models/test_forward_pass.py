"""The backbone's forward pass: one f, its own weights and masks, whatever happens around it."""

import copy
import gc
import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.utils.checkpoint import checkpoint

from mdeq_mm.deq import Anderson, ImplicitLayer, LimitedMemoryBroyden, PhantomGradient
from mdeq_mm.layers import VariationalDropout2d
from mdeq_mm.models import MDEQCell

from ..checks import OLD_TORCH, assert_nonzero, assert_same
from ..test_robustness import SOLVERS, contracting, tiny_backbone
from ..threads import standing_in

GRADIENTS = dict(
    implicit=dict(type='ImplicitGradient', solver=dict(type='Anderson', max_iter=40, tol=1e-10)),
    truncated=dict(type='TruncatedGradient', steps=3),
    jacobian_free=dict(type='JacobianFreeGradient'),
    shared_inverse=dict(type='SharedInverseGradient', steps=2),
    phantom=dict(type='PhantomGradient', steps=3),
)
WAYS = {name: dict(gradient=gradient) for name, gradient in GRADIENTS.items()}
WAYS['unrolled'] = dict(unrolled_layers=3)
every_gradient = pytest.mark.parametrize('gradient', GRADIENTS.values(), ids=GRADIENTS)
every_way = pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
every_solver = pytest.mark.parametrize('kind', SOLVERS)


def make(kind='Anderson', max_iter=40, tol=1e-10, **options):
    """In float64, where a difference is an error and not rounding."""
    options = dict(stem_norm_cfg=dict(type='GN', num_groups=4), **options)
    return contracting(tiny_backbone(kind, max_iter, tol, **options)).double()


def own_cell(cell, channels, max_iter=40, tol=1e-10, **options):
    torch.manual_seed(0)
    default = dict(
        stem_strides=(2,),
        stem_norm_cfg=dict(type='GN', num_groups=4),
        solver=dict(type='Anderson', max_iter=max_iter, tol=tol),
        gradient=GRADIENTS['implicit'],
    )
    net = dict(type='MDEQBackbone', channels=channels, cell=cell, **{**default, **options})
    return MODELS.build(net).double().train()


def image(seed=1, dtype=torch.float64):
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(outs):
    return sum(
        (out.double() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outs
    )


def gradients(net, x=None, context=nullcontext, seed=0):
    """Gradients by name, without the parameters that have none."""
    net.zero_grad()
    torch.manual_seed(seed)
    with context():
        loss_of(net(image() if x is None else x)).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def predict(net, x=None):
    with torch.no_grad():
        return net(image() if x is None else x)


def equal(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-6)


@every_way
def test_a_cache_of_the_caller_loses_no_gradient(way):
    net = make(**way)
    expected, got = gradients(net), gradients(net, context=parametrize.cached)
    assert got.keys() == expected.keys() == dict(net.named_parameters()).keys()
    equal(got, expected)


@every_way
def test_one_thread_trains_while_another_predicts_with_the_same_model(way):
    net = make(**way)
    expected, answer = gradients(net), predict(net)
    with standing_in(net.cell, lambda: predict(net), visit=2) as prediction:
        got = gradients(net)
    equal(got, expected)
    equal(prediction.result(), answer)
    with standing_in(net.cell, lambda: gradients(net), visit=2) as training:
        equal(predict(net), answer)
    equal(training.result(), expected)


@every_way
@pytest.mark.parametrize('drop_rate', [0.0, 0.4])
def test_two_copies_train_in_two_threads(way, drop_rate):
    net = make(drop_rate=drop_rate, **way)
    twin = copy.deepcopy(net)
    expected = [gradients(net, image(1)), gradients(twin, image(2), seed=7)]
    # The first has drawn its masks when the second begins.
    with standing_in(net.cell, lambda: gradients(net, image(1)), visit=2) as first:
        second = gradients(twin, image(2), seed=7)
    equal(second, expected[1])
    equal(first.result(), expected[0])


def test_weights_are_loaded_while_another_model_predicts():
    busy, net, other = make(), make(), make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    with standing_in(busy.cell, lambda: predict(busy), visit=2):
        before = predict(net)
        net.load_state_dict(other.state_dict())
        after = predict(net)
    assert not torch.allclose(before[0], after[0])
    equal(after, predict(other))


@MODELS.register_module()
class NestedCell(MDEQCell):
    """An MDEQCell whose injection is the equilibrium of y = 0.5 tanh(W y + x), W orthogonal."""

    def __init__(self, channels, solve=True):
        super().__init__(channels, expansion=1, norm_cfg=dict(type='GN', num_groups=4))
        self.mix = parametrizations.orthogonal(nn.Linear(channels[0], channels[0]))
        solver = LimitedMemoryBroyden(max_iter=60, tol=1e-12)
        self.layer = ImplicitLayer(solver, PhantomGradient(steps=50, damping=1))
        self.solve = solve

    def step(self, y, x):
        return 0.5 * torch.tanh(self.mix(y.movedim(1, -1)).movedim(-1, 1) + x)

    def forward(self, states, injection):
        if self.solve:
            y = self.layer(lambda y: self.step(y, injection), torch.zeros_like(injection))
        else:
            y = torch.zeros_like(injection)
            for _ in range(50):
                y = self.step(y, injection)
        return super().forward(states, y)


def test_an_equilibrium_inside_a_cell_has_the_gradient_of_the_unrolled_one():
    cell = dict(type='NestedCell', channels=(8, 16))
    exact = dict(max_iter=60, tol=1e-11, gradient=GRADIENTS['implicit'])
    nested = contracting(own_cell(dict(cell, solve=True), channels=(8, 16), **exact))
    unrolled = own_cell(dict(cell, solve=False), channels=(8, 16), unrolled_layers=40)
    unrolled.load_state_dict(nested.state_dict())
    got, wanted = gradients(nested.eval()), gradients(unrolled.eval())
    assert got['cell.mix.parametrizations.weight.original'].any()
    equal(got, wanted)


class DropoutNet(nn.Module):
    """A net of one's own with dropout in f, which it gives as a module or as a function."""

    def __init__(self, form):
        super().__init__()
        self.f = nn.Sequential(VariationalDropout2d(0.5), nn.Conv2d(3, 3, 1), nn.Tanh())
        self.implicit = ImplicitLayer(
            LimitedMemoryBroyden(max_iter=50, tol=1e-11), PhantomGradient()
        )
        self.form = form

    def forward(self, x):
        return [self.implicit(self.form(self.f), x)]


def compiled(f):
    """By dynamo only, which keeps the arithmetic."""
    return torch.compile(f, backend='eager')


def compiled_in_place(f):
    f.compile(backend='eager')
    return f


def backbone_with_compiled_cell():
    net = make(drop_rate=0.5)
    net.cell.compile(backend='eager')
    return net


DROPOUT_NETS = dict(
    backbone=lambda: make(drop_rate=0.5),
    module=lambda: DropoutNet(lambda f: f).double(),
    closure=lambda: DropoutNet(lambda f: lambda z: f(z)).double(),
    compiled=lambda: DropoutNet(compiled).double(),
    compiled_closure=lambda: DropoutNet(lambda f: compiled(lambda z: f(z))).double(),
    compiled_in_place=lambda: DropoutNet(compiled_in_place).double(),
    compiled_cell=backbone_with_compiled_cell,
)


@pytest.mark.parametrize('build', DROPOUT_NETS.values(), ids=DROPOUT_NETS)
def test_monte_carlo_dropout_draws_a_mask_a_forward_pass(build):
    """Only the dropout is in training mode, as for Monte Carlo estimates of uncertainty."""
    torch.manual_seed(0)
    net, masks, samples, seen = build().eval(), [], [], []
    # torch 2.9 does not call the hooks of a module inside a compiled one.
    watched = not (OLD_TORCH and build is backbone_with_compiled_cell)
    assert_same(predict(net)[0], predict(net)[0])
    drops = [m for m in net.modules() if isinstance(m, VariationalDropout2d)]
    for drop in drops:
        drop.train()
    drops[0].register_forward_hook(lambda drop, x, out: masks.append((out / x[0]).flatten(2)))
    torch.manual_seed(0)
    for _ in range(4):
        masks.clear()
        samples.append(predict(net)[0])
        # One mask for all evaluations of f, so that there is an equilibrium to find.
        assert net.implicit.forward_stats.summary()['converged'] == 1
        if not watched:
            continue
        dropped = [mask.nan_to_num(0).amax(2) > 0.5 for mask in masks]
        assert len(dropped) > 2 and all(torch.equal(d, dropped[1]) for d in dropped[1:])
        seen.append(dropped[1])
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) > 1 or not watched
    assert len({tuple(out.flatten().tolist()) for out in samples}) > 1
    torch.manual_seed(0)
    assert_same(predict(net)[0], samples[0])


@MODELS.register_module()
class DropoutCell(nn.Module):
    """One scale, with a mask of its own at each call."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.drop = nn.Dropout(0.3)

    def state_shapes(self, injection):
        return [(self.channels, *injection.shape[-2:])]

    def forward(self, states, injection):
        return [0.5 * self.drop(states[0]) + injection]


def test_a_cell_that_changes_from_call_to_call_is_named_once():
    net = MODELS.build(
        dict(
            type='MDEQBackbone',
            channels=(8,),
            cell=dict(type='DropoutCell', channels=8),
            solver=dict(type='Anderson', max_iter=6),
            gradient=dict(type='JacobianFreeGradient'),
        )
    )
    with pytest.warns(UserWarning, match='f is not the same.*VariationalDropout2d') as caught:
        for training in (True, True, False):
            net.train(training)(torch.ones(1, 3, 8, 8))
    assert len(caught) == 1


@MODELS.register_module()
class SpectralCell(nn.Module):
    """One scale: z -> tanh(0.7 W z + x) with |W| near 1, by either of torch's spectral norms."""

    def __init__(self, channels, hooks=False):
        super().__init__()
        norm = hooked_spectral_norm if hooks else parametrizations.spectral_norm
        self.channels = channels
        self.conv = norm(nn.Conv2d(channels, channels, 1, bias=False))

    def state_shapes(self, injection):
        return [(self.channels, *injection.shape[-2:])]

    def forward(self, states, injection):
        return [torch.tanh(0.7 * self.conv(states[0]) + injection)]


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('hooks', [False, True])
@every_gradient
def test_spectral_norm_in_an_own_cell_is_one_norm_a_forward_pass(hooks, gradient):
    cell = dict(type='SpectralCell', channels=8, hooks=hooks)
    net = own_cell(cell, channels=(8,), max_iter=80, tol=1e-12, gradient=gradient)
    (z,) = net.train()(image())
    assert net.implicit.forward_stats.residual.max() <= 1e-12
    # Evaluation mode keeps the last norm.
    net.cell.eval()
    with torch.no_grad():
        problem = net.problem(image())
        (fz,) = problem.maps(problem(z.movedim(1, -1).flatten(1)))
    torch.testing.assert_close(z, fz, atol=1e-11, rtol=0)


@MODELS.register_module()
class CheckpointedCell(MDEQCell):
    """An MDEQCell that computes its activations once more in the backward pass."""

    def forward(self, states, injection):
        return checkpoint(super().forward, states, injection, use_reentrant=False)


@every_way
@pytest.mark.parametrize('drop_rate', [0.0, 0.4])
def test_activation_checkpointing_inside_f_leaves_the_gradient_as_it_is(way, drop_rate):
    plain = make(drop_rate=drop_rate, **way)
    norm_cfg = dict(type='GN', num_groups=4)
    cell = dict(channels=(8, 16), expansion=1, drop_rate=drop_rate, norm_cfg=norm_cfg)
    saving = own_cell(dict(type='CheckpointedCell', **cell), channels=(8, 16), **way)
    saving.load_state_dict(plain.state_dict())
    expected, got = gradients(plain), gradients(saving)
    assert got.keys() == expected.keys() == dict(plain.named_parameters()).keys()
    equal(got, expected)


@every_gradient
def test_derivatives_by_the_returned_maps_are_the_loss_s(gradient):
    net, x = make(gradient=gradient), image()
    maps = net(x)
    got = torch.autograd.grad(sum((z**2).sum() for z in maps), maps)
    torch.testing.assert_close(list(got), [2 * z.detach() for z in maps])
    # J'v with a graph, by the cell.
    injection = net.injection(net.stem(x)).detach()
    at = [z.detach().requires_grad_() for z in maps]
    products = []
    for point in (maps, at):
        out = net.cell(list(point), injection)
        products.append(torch.autograd.grad(loss_of(out), point, create_graph=True))
    torch.testing.assert_close(*products)
    assert_nonzero(products[0])


@every_gradient
def test_evaluation_makes_one_call_of_f_after_the_solve(gradient):
    net, calls = make(max_iter=5, tol=0, gradient=gradient), []
    net.cell.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    evaluated = predict(net.eval())
    assert calls == [False] * 6
    trained = net(image())
    assert_same(evaluated, trained)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_each_normed_weight_is_computed_once_a_forward_pass(training):
    net, computed = make(max_iter=5, tol=0).train(training), Counter()
    weights = {
        name: module
        for name, module in net.cell.named_modules()
        if isinstance(module, parametrize.ParametrizationList)
    }
    assert weights
    for name, module in weights.items():
        module.register_forward_hook(lambda *_, name=name: computed.update([name]))
    for count in (1, 2):
        # Six calls of f each, with weights that may differ in the next pass.
        predict(net)
        assert computed == dict.fromkeys(weights, count)
    if training:
        loss_of(net(image())).backward()
        assert computed == dict.fromkeys(weights, 3)


def test_shared_inverse_in_evaluation_skips_and_keeps_nothing(monkeypatch):
    options = dict(skip_solved=True, max_iter=30, tol=1e-6)
    # One image is solved at once, so that the other goes on alone.
    x, states, init = image(), [], Anderson.init
    x[0] = 0

    def noted(solver, z0):
        state = init(solver, z0)
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(Anderson, 'init', noted)
    rows, outs = [], []
    for name in ('shared_inverse', 'jacobian_free'):
        net, batches = make(gradient=GRADIENTS[name], **options).eval(), []
        net.cell.register_forward_hook(lambda *args, seen=batches: seen.append(len(args[-1][0])))
        outs.append(predict(net, x))
        rows.append(batches)
    assert rows[0] == rows[1] and set(rows[0]) == {1, 2}
    assert all(torch.equal(a, b) for a, b in zip(*outs))
    gc.collect()
    assert len(states) == 2 and all(state() is None for state in states)


@every_solver
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@every_gradient
def test_a_net_in_half_precision(kind, dtype, training, gradient):
    if kind == 'FixedPointIteration' and gradient['type'] == 'SharedInverseGradient':
        pytest.skip('plain iteration learns no inverse')
    options = dict(max_iter=10, tol=1e-3, gradient=gradient)
    exact = make(kind, **options).train(training)
    half = make(kind, **options).to(dtype).train(training)
    outs, wanted = half(image(dtype=dtype)), exact(image())
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    for out, z in zip(outs, wanted):
        assert out.dtype == dtype
        error = torch.linalg.vector_norm(out.double() - z) / torch.linalg.vector_norm(z)
        assert error < tolerance
    got, expected = gradients(half, image(dtype=dtype)), gradients(exact)
    assert got.keys() == expected.keys()
    assert {g.dtype for g in got.values()} == {dtype}
    a, b = (torch.cat([g.double().flatten() for g in x.values()]) for x in (got, expected))
    assert torch.cosine_similarity(a, b, 0) > 0.98
    # The iterate is in float32: no residual falls so far in half precision.
    assert half.implicit.forward_stats.residual.dtype == torch.float32


WITH_SECOND_DERIVATIVES = dict(
    unrolled=dict(unrolled_layers=3),
    phantom=dict(gradient=dict(type='PhantomGradient', steps=10, damping=1)),
)


@pytest.mark.parametrize('way', WITH_SECOND_DERIVATIVES.values(), ids=WITH_SECOND_DERIVATIVES)
def test_second_derivatives_are_those_of_finite_differences(way):
    net = make(channels=(4, 4), max_iter=60, tol=1e-13, **way).eval()
    net.cell.smooth = True
    x = image()[:1, :, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: net(x)[1], (x,), atol=1e-6, rtol=1e-3, nondet_tol=1e-10, fast_mode=True
    )
