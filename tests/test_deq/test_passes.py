"""f is one function during a forward pass, independent of other passes, threads and callers."""

import copy
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.utils.checkpoint import checkpoint

from mdeq_mm.deq import (
    ImplicitGradient,
    ImplicitLayer,
    JacobianFreeGradient,
    LimitedMemoryBroyden,
    PhantomGradient,
    SharedInverseGradient,
    TruncatedGradient,
)
from mdeq_mm.deq.layer import _other_residual
from mdeq_mm.deq.passes import is_sharded

from ..threads import standing_in

TIGHT = LimitedMemoryBroyden(max_iter=100, tol=1e-13, memory=20)
LAYERS = dict(
    implicit=lambda: ImplicitLayer(TIGHT, ImplicitGradient(TIGHT)),
    truncated=lambda: ImplicitLayer(TIGHT, TruncatedGradient(steps=3)),
    jacobian_free=lambda: ImplicitLayer(TIGHT, JacobianFreeGradient()),
    shared_inverse=lambda: ImplicitLayer(TIGHT, SharedInverseGradient(steps=2)),
    phantom=lambda: ImplicitLayer(TIGHT, PhantomGradient(steps=3)),
    unrolled=lambda: ImplicitLayer(TIGHT, JacobianFreeGradient(), unrolled_layers=4),
)
every_layer = pytest.mark.parametrize('make', LAYERS.values(), ids=LAYERS)


def weight_normed(size):
    return parametrizations.weight_norm(nn.Linear(size, size))


def orthogonal(size):
    return parametrizations.orthogonal(nn.Linear(size, size))


class Map(nn.Module):
    """z -> tanh(0.5 W z + x), with a W that is computed from other parameters."""

    def __init__(self, normed=weight_normed, checkpointed=False, size=6):
        super().__init__()
        self.linear = normed(size)
        self.checkpointed = checkpointed
        self.x = torch.randn(4, size)

    def forward(self, z, x=None):
        if self.checkpointed:
            return checkpoint(self.body, z, x, use_reentrant=False)
        return self.body(z, x)

    def body(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + (self.x if x is None else x))


# How a user may hand the same f to a layer.
FORMS = dict(
    module=lambda net: net,
    method=lambda net: net.forward,
    partial=lambda net: partial(net, x=net.x),
    closure=lambda net: lambda z: net(z),
)
every_form = pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
# Those in which the module can be seen.
SEEN_FORMS = {name: form for name, form in FORMS.items() if name != 'closure'}


def compiled(net):
    """By dynamo only, which keeps the arithmetic."""
    return torch.compile(net, backend='eager')


CHANGING = 'f is not the same function at each call'
# No other test may cause that warning.
pytestmark = pytest.mark.filterwarnings(f'error:{CHANGING}')


def make_map(*args, **kwargs):
    torch.manual_seed(0)
    return Map(*args, **kwargs).double()


@pytest.fixture(autouse=True)
def float64():
    """In float64, where a difference is an error and not rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loss_of(z):
    return (z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum()


def gradients(layer, net, form=FORMS['module'], context=nullcontext):
    """Gradients by name, without the parameters that have none."""
    net.zero_grad()
    with context():
        loss_of(layer(form(net), torch.zeros_like(net.x))).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def unrolled_gradients(net, steps=60):
    z = torch.zeros_like(net.x)
    for _ in range(steps):
        z = net(z)
    grads = torch.autograd.grad(loss_of(z), list(net.parameters()))
    return dict(zip(dict(net.named_parameters()), grads))


class Holder(nn.Module):
    """Calls a net that is not among its modules."""

    def __init__(self, net):
        super().__init__()
        self.nets = [net]

    def forward(self, z):
        return self.nets[0](z)


# Forms in which the module cannot be seen, whatever f is.
HIDDEN_FORMS = dict(
    argument=lambda net: partial(lambda module, z: module(z), net),
    unregistered=Holder,
)


@pytest.mark.parametrize('form', [*FORMS.values(), *HIDDEN_FORMS.values()])
@every_layer
def test_a_cache_of_the_caller_loses_no_gradient(make, form):
    net = make_map()
    expected = gradients(make(), net, form)
    got = gradients(make(), net, form, parametrize.cached)
    assert got.keys() == expected.keys() == dict(net.named_parameters()).keys()
    torch.testing.assert_close(got, expected)


@every_form
def test_computed_weights_get_the_gradient_of_the_unrolled_net(form):
    net = make_map()
    expected = unrolled_gradients(net)
    torch.testing.assert_close(
        gradients(LAYERS['implicit'](), net, form), expected, atol=1e-9, rtol=1e-7
    )


class Nested(nn.Module):
    """z -> s y + x, where y = tanh(0.5 W y + z): an equilibrium inside f."""

    def __init__(self, normed, form):
        super().__init__()
        self.inner = Map(normed, size=4)
        self.layer = LAYERS['implicit']()
        self.form = form
        self.scale = nn.Parameter(torch.full((4,), 0.25))
        self.x = torch.randn(4, 4)

    def forward(self, z):
        f = partial(self.inner, x=z) if self.form == 'partial' else lambda y: self.inner(y, z)
        return self.scale * self.layer(f, torch.zeros_like(z)) + self.x

    def unrolled(self, z):
        y = torch.zeros_like(z)
        for _ in range(40):
            y = self.inner(y, z)
        return self.scale * y + self.x


@pytest.mark.parametrize('normed', [weight_normed, orthogonal])
@pytest.mark.parametrize('inner_form', ['partial', 'closure'])
@pytest.mark.parametrize('outer', ['implicit', 'phantom'])
@pytest.mark.parametrize('outer_form', ['module', 'closure'])
def test_an_equilibrium_inside_f_has_the_gradient_of_the_unrolled_net(
    normed, inner_form, outer, outer_form
):
    torch.manual_seed(0)
    net = Nested(normed, inner_form)
    layer = dict(
        implicit=LAYERS['implicit'](),
        phantom=ImplicitLayer(TIGHT, PhantomGradient(steps=40, damping=1)),
    )[outer]
    got = gradients(layer, net, FORMS[outer_form])
    z = torch.zeros_like(net.x)
    with parametrize.cached():
        for _ in range(40):
            z = net.unrolled(z)
    wanted = torch.autograd.grad(loss_of(z), list(net.parameters()))
    assert len(got) == len(wanted) >= 3
    torch.testing.assert_close(list(got.values()), list(wanted), atol=1e-8, rtol=1e-6)


def predict(layer, net):
    with torch.no_grad():
        return layer(net, torch.zeros_like(net.x))


@every_layer
def test_one_thread_trains_while_another_predicts_with_the_same_model(make):
    net, layer = make_map(), make()
    expected, answer = gradients(layer, net), predict(layer, net)
    with standing_in(net, lambda: predict(layer, net), visit=2) as prediction:
        got = gradients(layer, net)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(prediction.result(), answer)
    # And the other way round.
    with standing_in(net, lambda: gradients(layer, net), visit=2) as training:
        torch.testing.assert_close(predict(layer, net), answer)
    torch.testing.assert_close(training.result(), expected)


@every_layer
def test_two_copies_train_in_two_threads(make):
    nets, layer = [make_map(), make_map()], make()
    nets[1].x *= -2
    expected = [gradients(make(), net) for net in nets]
    layers = layer, copy.deepcopy(layer)
    with standing_in(nets[0], lambda: gradients(layers[0], nets[0]), visit=3) as first:
        second = gradients(layers[1], nets[1])
    torch.testing.assert_close([first.result(), second], expected)


@every_form
def test_weights_are_loaded_while_another_model_predicts(form):
    layer, busy, net, other = LAYERS['implicit'](), make_map(), make_map(), make_map()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    with standing_in(busy, lambda: predict(layer, busy), visit=2), torch.no_grad():
        before = layer(form(net), torch.zeros_like(net.x))
        net.load_state_dict(other.state_dict())
        after = layer(form(net), torch.zeros_like(net.x))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, predict(layer, other))


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('norm', [parametrizations.spectral_norm, hooked_spectral_norm])
@pytest.mark.parametrize('form', [*SEEN_FORMS.values(), compiled], ids=[*SEEN_FORMS, 'compiled'])
def test_spectral_norm_makes_one_power_iteration_a_forward_pass(norm, form):
    net = make_map(lambda size: norm(nn.Linear(size, size, bias=False))).train()
    twin = copy.deepcopy(net)
    z = (layer := LAYERS['implicit']())(form(net), torch.zeros_like(net.x))
    assert layer.forward_stats.residual.max() <= 1e-13
    # Evaluation mode keeps the last norm.
    net.eval()
    torch.testing.assert_close(z, net(z), atol=1e-12, rtol=0)
    # One iteration, and the gradient with the weight that it gave.
    twin(z)
    for got, wanted in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)
    twin.eval()
    (wanted,) = unrolled_gradients(twin).values()
    (got,) = torch.autograd.grad(loss_of(z), list(net.parameters()))
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)


CHANGING_FUNCTIONS = dict(
    spectral_norm=lambda net: lambda z: net(z),
    dropout=lambda net: nn.Sequential(net, nn.Dropout(0.5)),
    noise=lambda net: lambda z: net(z) + 0.01 * torch.randn_like(z),
)


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('change', CHANGING_FUNCTIONS)
@pytest.mark.parametrize('graph', [True, False])
def test_an_f_that_changes_from_call_to_call_is_named_once(change, graph):
    """The reported residual is not that of the returned value."""
    normed = parametrizations.spectral_norm if change == 'spectral_norm' else lambda linear: linear
    net = make_map(lambda size: normed(nn.Linear(size, size)))
    if change == 'spectral_norm':
        # New weights, which its vectors do not fit yet, and few evaluations: with many the power
        # iteration converges.
        net.linear.parametrizations.weight.original.data.normal_()
    solver = LimitedMemoryBroyden(max_iter=6)
    f, layer = CHANGING_FUNCTIONS[change](net), ImplicitLayer(solver, ImplicitGradient(solver))
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(graph):
        warnings.simplefilter('always')
        for _ in range(3):
            layer(f, torch.zeros_like(net.x))
        (warning,) = [w for w in caught if CHANGING in str(w.message)]
        assert 'Give f as a module' in str(warning.message)
        # In evaluation mode only the noise still changes.
        caught.clear()
        net.eval()
        layer.eval()(f.eval() if change == 'dropout' else f, torch.zeros_like(net.x))
        assert len(caught) == (change == 'noise')


@pytest.mark.filterwarnings('ignore::FutureWarning')
@every_form
def test_weight_norm_by_hooks_trains_as_by_a_parametrization(form):
    hooked = make_map(lambda size: hooked_weight_norm(nn.Linear(size, size)))
    net = make_map()
    for old, new in (('g', '0'), ('v', '1')):
        weight = getattr(hooked.linear, f'weight_{old}').data
        getattr(net.linear.parametrizations.weight, f'original{new}').data.copy_(weight)
    net.linear.bias.data.copy_(hooked.linear.bias.data)
    got, wanted = (gradients(LAYERS['implicit'](), n, form) for n in (hooked, net))
    assert len(got) == len(wanted) == 3
    for (name, grad), key in zip(sorted(got.items()), sorted(wanted), strict=True):
        torch.testing.assert_close(grad, wanted[key], msg=name)


@every_form
@every_layer
def test_activation_checkpointing_inside_f_leaves_the_gradient_as_it_is(make, form):
    plain, saving = make_map(), make_map(checkpointed=True)
    expected, got = (gradients(make(), net, form) for net in (plain, saving))
    assert len(got) == 3
    torch.testing.assert_close(got, expected)


def test_two_passes_with_checkpoints_keep_their_own_weights():
    """A backward pass that repeats f uses the weights of its forward pass, as in autograd."""
    net, layer = make_map(checkpointed=True), LAYERS['phantom']()
    starts = torch.zeros(4, 6), torch.ones(4, 6)
    single = [torch.autograd.grad(loss_of(layer(net, s)), list(net.parameters())) for s in starts]
    losses = [loss_of(layer(net, s)) for s in starts]
    for index in (1, 0):
        got = torch.autograd.grad(losses[index], list(net.parameters()))
        torch.testing.assert_close(got, single[index])


def test_state_that_f_keeps_on_itself_is_its_copys():
    """Documented: values assigned in forward are lost, buffers changed in place are kept."""

    class Counting(Map):
        def __init__(self):
            super().__init__()
            self.register_buffer('calls', torch.zeros(()))
            self.last = None

        def forward(self, z, x=None):
            self.calls += 1
            self.last = z
            return super().forward(z, x)

    torch.manual_seed(0)
    net = Counting()
    layer = ImplicitLayer(LimitedMemoryBroyden(max_iter=5, tol=0), JacobianFreeGradient())
    layer(net, torch.zeros(4, 6))
    assert net.last is None and net.calls == 6


def test_weights_shared_by_two_modules_of_f_are_computed_once():
    class Counted(nn.Module):
        count = 0

        def forward(self, weight):
            Counted.count += 1
            return 0.3 * weight

    linear = nn.Linear(6, 6)
    parametrize.register_parametrization(linear, 'weight', Counted())
    net = nn.Sequential(linear, nn.Tanh(), linear)
    Counted.count = 0
    LAYERS['implicit']()(net, torch.zeros(2, 6)).sum().backward()
    assert Counted.count == 1
    assert linear.parametrizations.weight.original.grad.any()


@pytest.mark.parametrize('form', ['FullyShardedDataParallel', 'FSDPModule'])
def test_a_module_that_fsdp_shards_is_told_by_either_class(form, monkeypatch):
    class Sharded(nn.Module):
        pass

    # Not imported by anyone, it shards nothing.
    monkeypatch.delitem(sys.modules, 'torch.distributed.fsdp', raising=False)
    assert not is_sharded(Sharded())
    monkeypatch.setitem(sys.modules, 'torch.distributed.fsdp', SimpleNamespace(**{form: Sharded}))
    assert is_sharded(Sharded()) and not is_sharded(nn.Module())


@pytest.mark.parametrize(
    'dtype, autocast, within, beyond',
    [
        (torch.float64, False, 5e-8, 5e-7),
        (torch.float32, False, 5e-4, 5e-3),
        (torch.float32, True, 5e-3, 5e-2),
    ],
)
def test_a_call_may_contradict_the_solve_by_rounding_only(dtype, autocast, within, beyond):
    """An f that moved by less than its dtype rounds is the same function."""

    def found(moved):
        z = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=dtype)
        out = z.clone()
        # Of length 5; the residual is relative to f's value.
        out[1, 0] += 5 * moved
        solution = SimpleNamespace(z=z, residual=torch.zeros(2, dtype=dtype))
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            return _other_residual(solution, out)

    assert found(within) is None
    reported, residual = found(beyond)
    assert reported == 0 and residual == pytest.approx(beyond, rel=0.05)
