"""The user's own f in plain torch: what it may be, and the errors for what it may not."""

import copy
import warnings
from collections import namedtuple
from functools import partial

import pytest
import torch
from torch import nn

from mdeq_mm.deq import (
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    ImplicitLayer,
    JacobianFreeGradient,
    LimitedMemoryBroyden,
    PhantomGradient,
    PreviousStart,
    SharedInverseGradient,
    Status,
    TruncatedGradient,
    problem_of,
    solve,
)
from mdeq_mm.deq.solvers.products import Products, register_products

from ..checks import assert_same, assert_says

pytestmark = pytest.mark.filterwarnings('error:f is not the same function')

TIGHT = LimitedMemoryBroyden(max_iter=80, tol=1e-13, memory=20)
EXACT = ImplicitLayer(TIGHT, ImplicitGradient(TIGHT))
SOLVERS = dict(plain=FixedPointIteration, anderson=Anderson, broyden=LimitedMemoryBroyden)
GRADIENTS = dict(
    implicit=lambda solver: ImplicitGradient(solver),
    truncated=lambda _: TruncatedGradient(steps=4),
    jacobian_free=lambda _: JacobianFreeGradient(),
    shared_inverse=lambda _: SharedInverseGradient(steps=1),
    phantom=lambda _: PhantomGradient(steps=4),
)
# Plain iteration learns nothing of the Jacobian that could be shared.
PAIRS = [(s, g) for s in SOLVERS for g in GRADIENTS if (s, g) != ('plain', 'shared_inverse')]
every_pair = pytest.mark.parametrize('solver, gradient', PAIRS, ids=['-'.join(p) for p in PAIRS])
every_solver = pytest.mark.parametrize('kind', SOLVERS.values(), ids=SOLVERS)


def layer_of(solver, gradient, max_iter=40, tol=1e-5):
    solver = SOLVERS[solver](max_iter=max_iter, tol=tol)
    return ImplicitLayer(solver, GRADIENTS[gradient](solver))


class Net(nn.Module):
    """f(z) = tanh(conv(z + x)) on maps (N, 3, 5, 4), a contraction."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.conv.weight.data.mul_(0.5)

    def forward(self, z, x):
        # In low precision under autocast, whatever z is.
        return torch.tanh(self.conv(z + x))


FORMS = dict(
    module=lambda net, x: partial(net, x=x),
    closure=lambda net, x: lambda z: net(z, x),
)
every_form = pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)


def image(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 5, 4, generator=generator).to(dtype)


def weighted(z):
    """A loss without the symmetries of a sum."""
    return (z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum()


def cosine(*tensors):
    a, b = (torch.cat([x.flatten().double() for x in t]) for t in tensors)
    return torch.cosine_similarity(a, b, 0)


# Structure of the state.


@pytest.mark.parametrize(
    'shape', [(3,), (3, 4), (3, 2, 5), (3, 2, 5, 4), (3, 2, 2, 2, 2), (0, 4)], ids=str
)
def test_a_state_of_any_trailing_shape(shape):
    size = torch.Size(shape).numel()
    x = torch.linspace(-1, 1, size, dtype=torch.float64).view(shape).requires_grad_()
    z = EXACT(lambda z: 0.5 * z + x, torch.zeros_like(x))
    assert z.shape == x.shape
    torch.testing.assert_close(z, 2 * x)
    (grad,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 2.0))


Pair = namedtuple('Pair', 'left right')
KINDS = dict(list=list, tuple=tuple, named=lambda parts: Pair(*parts))


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('returned', [list, tuple])
def test_several_tensors_are_one_state(kind, returned):
    """l = 0.5 mean r + x and r = 0.3 l + y: linear, so solved in closed form."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def f(state):
        assert type(state) is type(z0)
        left, right = state
        return returned([0.5 * right.mean(2) + x, 0.3 * left[:, :, None] + y])

    z0 = kind([torch.zeros(2, 3).double(), torch.zeros(2, 3, 4).double()])
    z = EXACT(f, z0)
    assert type(z) is type(z0)
    left = (0.5 * y.mean(2) + x) / 0.85
    right = 0.3 * left[:, :, None] + y
    torch.testing.assert_close(list(z), [left, right])
    got, wanted = (
        torch.autograd.grad(weighted(a) + b.square().sum(), (x, y)) for a, b in (z, (left, right))
    )
    torch.testing.assert_close(got, wanted)


def test_parts_of_different_dtypes_keep_theirs():
    z = EXACT(
        lambda z: (0.5 * z[0] + 1, 0.5 * z[1] + z[0].double()),
        (torch.zeros(2, 3), torch.zeros(2, 3).double()),
    )
    assert [part.dtype for part in z] == [torch.float32, torch.float64]
    torch.testing.assert_close(z[1], torch.full((2, 3), 4.0).double(), atol=1e-6, rtol=0)


@every_pair
def test_training_and_evaluation_return_f_of_the_same_point(solver, gradient):
    net, x = Net().double(), image(torch.float64)
    layer = layer_of(solver, gradient, max_iter=7, tol=0)
    trained = layer(partial(net, x=x), torch.zeros_like(x))
    evaluated = layer.eval()(partial(net, x=x), torch.zeros_like(x))
    with torch.no_grad():
        without = layer(partial(net, x=x), torch.zeros_like(x))
    assert_same(evaluated, trained)
    assert_same(without, trained)


@every_form
def test_phantom_gradient_calls_f_once_after_the_solve_in_evaluation(form):
    calls, net, x = [], Net(), image()
    net.conv.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    layer = ImplicitLayer(FixedPointIteration(max_iter=6, tol=0), PhantomGradient(steps=4))
    layer(form(net, x), torch.zeros_like(x))
    assert calls == [False] * 6 + [True] * 4
    calls.clear()
    with torch.no_grad():
        z = layer.eval()(form(net, x), torch.zeros_like(x))
        assert calls == [False] * 7
        wanted = torch.zeros_like(x)
        for _ in range(6):
            wanted = net(wanted, x)
    torch.testing.assert_close(z, wanted)


# Precision.


@every_pair
@every_form
def test_own_f_under_bfloat16_autocast(solver, gradient, form):
    net, x, seen = Net(), image(), []
    net.conv.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    layer = layer_of(solver, gradient, max_iter=12)
    grads, values = [], []
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            z = layer(form(net, x), torch.zeros_like(x))
            loss = weighted(z)
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
        values.append([z.detach()])
        # The state stays in full precision; f works in low.
        assert z.dtype == torch.float32 and set(seen) == {(torch.float32, dtype)}
    assert cosine(*grads) > 0.99
    assert cosine(*values) > 0.999


@every_solver
@every_form
def test_backward_inside_the_autocast_context(kind, form):
    net, x = Net(), image()
    solver = kind(max_iter=12, tol=1e-5)
    layer = ImplicitLayer(solver, ImplicitGradient(solver))
    parameters = list(net.parameters())
    wanted = torch.autograd.grad(weighted(layer(form(net, x), torch.zeros_like(x))), parameters)
    with torch.autocast('cpu', torch.bfloat16):
        loss = weighted(layer(form(net, x), torch.zeros_like(x)))
        got = torch.autograd.grad(loss, parameters)
    assert cosine(got, wanted) > 0.99


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@every_pair
@every_form
def test_own_f_in_half_precision(solver, gradient, form, dtype, training):
    exact, half, x = Net(), Net().to(dtype), image()
    layer = layer_of(solver, gradient, max_iter=12).train(training)
    z = layer(form(half, x.to(dtype)), torch.zeros_like(x, dtype=dtype))
    wanted = layer(form(exact, x), torch.zeros_like(x))
    assert z.dtype == dtype
    torch.testing.assert_close(z.float(), wanted, atol=0.03, rtol=0.03)
    got = torch.autograd.grad(weighted(z.float()), list(half.parameters()))
    assert {g.dtype for g in got} == {dtype}
    assert cosine(got, torch.autograd.grad(weighted(wanted), list(exact.parameters()))) > 0.99


@every_solver
def test_half_precision_is_solved_in_float32(kind):
    """f halves the distance to 1: in bfloat16 the iterate would stop at a residual of 4e-3."""
    layer = ImplicitLayer(kind(max_iter=60, tol=1e-5), JacobianFreeGradient())
    seen = set()

    def f(z):
        seen.add(z.dtype)
        return 0.5 * z.float() + 0.5

    z = layer(f, torch.zeros(2, 3, dtype=torch.bfloat16))
    assert seen == {z.dtype} == {torch.bfloat16}
    assert layer.forward_stats.residual.dtype == torch.float32
    assert set(layer.forward_stats.status.tolist()) == {Status.CONVERGED}


# The gradient with respect to what the layer returns.


class FlatNet(nn.Module):
    """f(z) = tanh(W z + x) on (N, 6): a state that needs no reshaping."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, z, x):
        return torch.tanh(0.8 * self.linear(z) + x)


NETS = dict(
    maps=lambda: (Net().double(), image(torch.float64)),
    flat=lambda: (FlatNet(), image(torch.float64).view(20, 6)),
)
every_net = pytest.mark.parametrize('make', NETS.values(), ids=NETS)


@every_pair
@every_form
@every_net
def test_derivative_by_the_returned_tensor_is_the_loss_s(solver, gradient, form, make):
    net, x = make()
    z = layer_of(solver, gradient)(form(net, x), torch.zeros_like(x))
    (got,) = torch.autograd.grad((z**2).sum(), z)
    torch.testing.assert_close(got, 2 * z.detach())


@every_pair
@every_form
@every_net
def test_vector_jacobian_product_at_the_returned_tensor(solver, gradient, form, make):
    """With a graph, as a hand-written penalty on the Jacobian needs it."""
    net, x = make()
    v = x.flip(0) + 1
    z = layer_of(solver, gradient)(form(net, x), torch.zeros_like(x))
    at = z.detach().requires_grad_()
    got, wanted = (
        torch.autograd.grad(net(point, x), point, v, create_graph=True)[0] for point in (z, at)
    )
    torch.testing.assert_close(got, wanted)


@every_solver
@every_form
@every_net
def test_penalty_on_the_jacobian_by_hand_has_the_gradient_of_the_unrolled_net(kind, form, make):
    """d/dw |J(z*(w), w)'v|^2, both directly and through z*."""
    net, x = make()
    v = x.flip(0) + 1
    solver = kind(max_iter=200, tol=1e-13)
    layer, wanted = ImplicitLayer(solver, ImplicitGradient(solver)), torch.zeros_like(x)
    for _ in range(80):
        wanted = net(wanted, x)
    grads = []
    for z in (layer(form(net, x), torch.zeros_like(x)), wanted):
        (vjp,) = torch.autograd.grad(net(z, x), z, v, create_graph=True)
        grads.append(torch.autograd.grad(vjp.square().sum(), list(net.parameters())))
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-7)


def test_derivative_by_one_of_several_returned_tensors():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    start = [torch.zeros_like(x), torch.zeros_like(x)]
    left, right = EXACT(lambda z: (0.5 * z[1] + x, 0.5 * z[0]), start)
    got = torch.autograd.grad((left**2).sum() + (left * right).sum(), (left, right))
    torch.testing.assert_close(got, ((2 * left + right).detach(), left.detach()))


# Second derivatives.


@pytest.mark.parametrize('gradient', ['implicit', 'truncated', 'shared_inverse'])
@every_form
def test_second_derivatives_by_the_hook_name_what_has_them(gradient, form):
    net, x = Net().double(), image(torch.float64)
    z = layer_of('broyden', gradient)(form(net, x), torch.zeros_like(x))
    with pytest.raises(NotImplementedError, match='PhantomGradient.*unrolled_layers'):
        torch.autograd.grad(weighted(z), net.conv.weight, create_graph=True)


def scalar_map(w, x):
    return lambda z: torch.tanh(0.5 * torch.sin(w) * z + x)


def scalars():
    w = torch.tensor([0.7, -1.1], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.3, -0.8], [1.2, 0.1]], dtype=torch.float64, requires_grad=True)
    return w, x


MANY_LAYERS = dict(
    phantom=ImplicitLayer(TIGHT, PhantomGradient(steps=60, damping=1)),
    damped=ImplicitLayer(TIGHT, PhantomGradient(steps=120, damping=0.6)),
    unrolled=ImplicitLayer(TIGHT, JacobianFreeGradient(), unrolled_layers=60),
)


@pytest.mark.parametrize('layer', MANY_LAYERS.values(), ids=MANY_LAYERS)
def test_second_derivatives_are_those_of_finite_differences(layer):
    """With so many layers the phantom gradient is the exact one, to rounding."""

    def z(w, x):
        return layer(scalar_map(w, x), torch.zeros_like(x))

    assert torch.autograd.gradcheck(z, scalars())
    assert torch.autograd.gradgradcheck(z, scalars())


def test_second_derivatives_of_few_phantom_layers_are_those_of_the_layers():
    """Against the layers written out, from the same constant start."""
    w, x = scalars()
    f = scalar_map(w, x)
    z = ImplicitLayer(TIGHT, PhantomGradient(steps=3, damping=0.6))(f, torch.zeros_like(x))
    layers = z.detach()
    for _ in range(3):
        layers = 0.4 * layers + 0.6 * f(layers)
    torch.testing.assert_close(z, layers)
    second = []
    for out in (z, layers):
        first = torch.autograd.grad(out.pow(3).sum(), (w, x), create_graph=True)
        second.append(torch.autograd.grad(sum((g * torch.sin(g)).sum() for g in first), (w, x)))
    torch.testing.assert_close(*second)


# An f that differentiates.


def energy_step(w, x):
    """z -> z - 0.5 dE/dz for E = |z - x|^2 / 2 + w log cosh z: its minimum is a fixed point."""

    def f(z):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = ((z - x) ** 2 / 2 + w * torch.log(torch.cosh(z))).sum()
            (slope,) = torch.autograd.grad(energy, z, create_graph=True)
            return z - 0.5 * slope

    return f


@every_pair
def test_an_f_that_is_a_gradient_itself(solver, gradient):
    w = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.3, -0.8], [1.2, 0.1]], dtype=torch.float64)
    z = layer_of(solver, gradient, tol=1e-12)(energy_step(w, x), torch.zeros_like(x))
    # dE/dz = 0
    torch.testing.assert_close(z + w * torch.tanh(z), x)
    (got,) = torch.autograd.grad(weighted(z), w)
    # dz/dw = -tanh z / (1 + w sech^2 z)
    wanted = weighted(-torch.tanh(z) / (1 + w / torch.cosh(z) ** 2))
    assert got * wanted > 0
    if gradient == 'implicit':
        torch.testing.assert_close(got, wanted)


def test_an_f_that_differentiates_without_enabling_grad_is_told_so():
    with pytest.raises(RuntimeError, match=r'enable_grad.*create_graph'):
        EXACT(lambda z: -torch.autograd.grad((z**2).sum(), z)[0], torch.zeros(2, 3))


# What cannot work gives an error of one sentence.


def test_an_f_in_another_dtype_than_its_start():
    for module, shape in ((nn.Linear(3, 3), (2, 3)), (nn.Conv2d(3, 3, 1), (2, 3, 4, 4))):
        with pytest.raises(RuntimeError, match='Give z0 the dtype f computes in'):
            EXACT(module.double(), torch.zeros(shape))
    # Where torch converts by itself it works, in the dtype of the start.
    z = EXACT(lambda z: 0.5 * z + torch.ones(3).double(), torch.zeros(2, 3))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, torch.full((2, 3), 2.0))


NO_STARTS = dict(
    integer=(torch.zeros(2, 3, dtype=torch.long), ['torch.int64', 'z0.float()']),
    complex=(torch.zeros(2, 3, dtype=torch.complex64), ['torch.complex64', 'view_as_real']),
    scalar=(torch.zeros(()), ['(N, ...)', 'got ()']),
    empty=(torch.zeros(2, 0, 4), ['at least one value', '(2, 0, 4)']),
    nothing=([], ['z0', 'list of 0']),
    batches=([torch.zeros(2, 3), torch.zeros(3, 3)], ['one batch size', '[2, 3]']),
    number_inside=([torch.zeros(2, 3), 1.0], ['tensors', 'float']),
    dict=(dict(a=torch.zeros(2, 3)), ['list or tuple', 'dict']),
    none=(None, ['z0 is missing']),
    number=(1.0, ['z0', 'float']),
)


@pytest.mark.parametrize('z0, words', NO_STARTS.values(), ids=NO_STARTS)
def test_what_is_no_start_is_named(z0, words):
    with pytest.raises((TypeError, ValueError)) as error:
        EXACT(lambda z: z, z0)
    assert_says(error, words)


NO_FUNCTIONS = dict(
    narrower=(lambda z: z[:, :2], ['[(3,)]', '[(2,)]', 'same']),
    two=(lambda z: (z, z), ['a tensor', 'tuple of 2']),
    nothing=(lambda z: None, ['a tensor', 'NoneType']),
    fewer_samples=(lambda z: z[:1], ['(2, 3)', '(1, 3)']),
    number=(7, ['function or a module', 'int']),
    in_place=(lambda z: z.relu_(), ['changed its argument in place', 'inplace=True']),
)


@pytest.mark.parametrize('f, words', NO_FUNCTIONS.values(), ids=NO_FUNCTIONS)
def test_what_is_no_function_of_the_state_is_named(f, words):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        EXACT(f, torch.full((2, 3), -1.0))
    assert_says(error, words)


def test_an_f_of_several_tensors_that_returns_one():
    with pytest.raises(TypeError, match='sequence of 2 tensors.*a tensor'):
        EXACT(lambda z: z[0], [torch.zeros(2, 3), torch.zeros(2, 3)])


def test_implicit_gradient_has_a_solver_and_takes_nothing_else_for_one():
    assert isinstance(ImplicitGradient().solver, LimitedMemoryBroyden)
    x = torch.ones(2, 3, requires_grad=True)
    layer = ImplicitLayer(Anderson(), ImplicitGradient())
    layer(lambda z: 0.5 * z + x, torch.zeros(2, 3)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 3), 2.0), rtol=1e-2, atol=0)
    for wrong in (None, 'Anderson', dict(type='Anderson'), Anderson):
        with pytest.raises(TypeError, match='solver must be a Solver'):
            ImplicitGradient(wrong)


# The shared inverse.


def test_shared_inverse_is_refused_over_a_solver_that_learns_nothing():
    message = 'LimitedMemoryBroyden or Anderson.*FixedPointIteration'
    with pytest.raises(TypeError, match=message):
        ImplicitLayer(FixedPointIteration(), SharedInverseGradient())
    plain = FixedPointIteration(max_iter=40)
    layer = ImplicitLayer(Anderson(), SharedInverseGradient(), eval_solver=plain).eval()
    x = torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        z = layer(lambda z: 0.5 * z + x, torch.zeros(2, 3))
    torch.testing.assert_close(z, torch.full((2, 3), 2.0), rtol=1e-2, atol=0)
    with pytest.raises(TypeError, match=message):
        layer(lambda z: 0.5 * z + x, torch.zeros(2, 3))


# Work in place.


def mask_two_columns(z):
    z[..., :2] = 0
    return z


IN_PLACE = dict(
    rectify=lambda z: torch.relu_(z), scale=lambda z: z.mul_(2), assign=mask_two_columns
)


@pytest.mark.parametrize('change', IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize('gradient', GRADIENTS)
@pytest.mark.parametrize('several', [False, True])
def test_the_result_may_be_changed_in_place(change, gradient, several):
    """f is linear, so torch saves nothing that the change would overwrite and raises no error."""
    x = image(torch.float64).requires_grad_()
    layer = layer_of('broyden', gradient)

    def result():
        if several:
            return layer(lambda z: [0.4 * z[0].flip(-1) + x], [torch.zeros_like(x)])[0]
        return layer(lambda z: 0.4 * z.flip(-1) + x, torch.zeros_like(x))

    got, wanted = change(result()), change(result().clone())
    torch.testing.assert_close(got, wanted)
    grads = (torch.autograd.grad(weighted(z), x)[0] for z in (got, wanted))
    torch.testing.assert_close(*grads)


def test_the_result_shares_no_memory_with_what_f_returned():
    constant = torch.ones(2, 3)
    EXACT(lambda z: constant, torch.zeros(2, 3)).add_(1)
    assert constant.eq(1).all()


# Inference mode.


def test_in_inference_mode_an_f_that_works_in_place_harms_nobody():
    """torch does not count changes there, so it cannot be refused as it is elsewhere."""
    x = image(torch.float64)
    with torch.inference_mode():
        got = EXACT(lambda z: 0.4 * torch.relu_(z).flip(-1) + x, torch.zeros_like(x))
    wanted = EXACT(lambda z: 0.4 * torch.relu(z).flip(-1) + x, torch.zeros_like(x))
    torch.testing.assert_close(got.clone(), wanted)


@pytest.mark.parametrize('gradient', GRADIENTS)
@pytest.mark.parametrize('unrolled_layers', [0, 2])
def test_a_start_made_in_inference_mode(gradient, unrolled_layers):
    """It solves the equation already, so z* is that tensor itself, which autograd refuses."""
    conv, x = Net().double().conv, image(torch.float64)
    layer = layer_of('anderson', gradient)

    def f(z):
        return torch.tanh(conv(z) + x)

    with torch.inference_mode():
        start = layer(f, torch.zeros_like(x))
    layer.unrolled_layers = unrolled_layers
    grads = []
    for z0 in (start, start.clone()):
        weighted(layer(f, z0)).backward()
        grads.append(conv.weight.grad)
        conv.zero_grad()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('gradient', GRADIENTS)
def test_a_previous_start_remembered_in_inference_mode(gradient):
    net, x = Net().double(), image(torch.float64)
    layer = layer_of('broyden', gradient)
    layer = ImplicitLayer(layer.solver, layer.gradient, start=PreviousStart()).eval()
    with torch.inference_mode():
        layer(partial(net, x=x), torch.zeros_like(x))
    weighted(layer(partial(net, x=x), torch.zeros_like(x))).backward()
    assert layer.forward_stats.num_iter.max() == 1 and net.conv.weight.grad.any()


# Other ways to differentiate.

TRANSFORMS = dict(
    grad=lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    vmap=lambda f, x: torch.func.vmap(lambda x: f(x[None])[0])(x),
    jvp=lambda f, x: torch.func.jvp(f, (x,), (x,)),
)


@pytest.mark.parametrize('transform', TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize('gradient', GRADIENTS)
def test_transforms_of_functions_are_refused_but_through_unrolled_layers(transform, gradient):
    x, layer = image(torch.float64), layer_of('broyden', gradient)

    def f(x):
        return layer(lambda z: torch.tanh(0.5 * z + x), torch.zeros(x.shape, dtype=x.dtype))

    with pytest.raises(NotImplementedError, match=r'torch\.func.*unrolled_layers'):
        transform(f, x)
    layer.unrolled_layers = 3
    got = transform(f, x)
    if transform is TRANSFORMS['vmap']:
        torch.testing.assert_close(got, f(x))


class Untangent(Products):
    """Sees values only."""

    def residual(self, fz, z, g):
        return super().residual(torch.autograd.forward_ad.unpack_dual(fz).primal, z, g)


@pytest.mark.parametrize('gradient', GRADIENTS)
@pytest.mark.parametrize('products', [None, Untangent()], ids=['torch', 'faster'])
def test_forward_mode_does_not_take_the_equilibrium_for_a_constant(gradient, products, monkeypatch):
    """Operations without a derivative, like those in C++, would drop it without an error."""
    monkeypatch.setattr('mdeq_mm.deq.solvers.products._FASTER', {})
    if products is not None:
        register_products('cpu', products)
    x, layer = image(torch.float64), layer_of('broyden', gradient)
    v, forward_ad = x.flip(0), torch.autograd.forward_ad

    def derivative():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, v)
            z = layer(lambda z: torch.tanh(0.5 * z + dual), torch.zeros_like(x))
            return forward_ad.unpack_dual(z).tangent

    with pytest.raises(NotImplementedError, match='Forward-mode.*unrolled_layers'):
        derivative()
    layer.unrolled_layers = 60
    z = layer(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x))
    slope = 1 - z.square()
    torch.testing.assert_close(derivative(), slope / (1 - 0.5 * slope) * v)


# A start that is learned.


@pytest.mark.parametrize('gradient', GRADIENTS)
def test_a_start_that_requires_grad_is_named_once(gradient):
    z0 = torch.full((2, 3), 0.1, requires_grad=True)
    x = torch.zeros(2, 3, requires_grad=True)
    layer = layer_of('broyden', gradient)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        with torch.no_grad():
            layer(lambda z: torch.cos(z + x), z0)
        assert not caught
        z = [layer(lambda z: torch.cos(z + x), z0) for _ in range(3)]
    assert len(caught) == 1
    assert all(word in str(caught[0].message) for word in ('start', 'requires grad', 'detached'))
    # The equilibrium does not depend on where its solve began.
    grad, other = torch.autograd.grad(z[0].sum(), (z0, x), allow_unused=True)
    assert grad is None and other.any()


def test_unrolled_layers_pass_a_gradient_to_their_start():
    z0 = torch.full((2, 3), 0.1, requires_grad=True)
    layer = ImplicitLayer(Anderson(), JacobianFreeGradient(), unrolled_layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        z = layer(torch.cos, z0)
    (got,) = torch.autograd.grad(z.sum(), z0)
    (wanted,) = torch.autograd.grad(torch.cos(torch.cos(z0)).sum(), z0)
    torch.testing.assert_close(got, wanted)


def frames(dtype=torch.float64):
    """f of each frame of a stream; neighbours have neighbouring equilibria and Jacobians."""
    gen = torch.Generator().manual_seed(0)
    coupling, x, drift = torch.randn(3, 40, 40, generator=gen, dtype=dtype)
    coupling = 0.9 * coupling / torch.linalg.matrix_norm(coupling, 2)
    for k in range(5):
        yield lambda z, k=k: torch.tanh(z @ coupling + x[:2] + 0.02 * k * drift[:2])


def evaluations_of_frames(solver, start, reset=False):
    layer = ImplicitLayer(solver, JacobianFreeGradient(), start=start).eval()
    counts = []
    for f in frames():
        if reset:
            layer.start.reset()
        z = layer(f, torch.zeros(2, 40, dtype=torch.float64))
        torch.testing.assert_close(z, f(z), rtol=0, atol=1e-4)
        counts.append(int(layer.forward_stats.num_iter.sum()))
    return counts


@pytest.mark.parametrize('kind', [Anderson, LimitedMemoryBroyden])
def test_the_history_of_the_last_frame_saves_evaluations(kind):
    solver = kind(max_iter=60, tol=1e-6, memory=20)
    cold = evaluations_of_frames(solver, PreviousStart(history=True), reset=True)
    warm = evaluations_of_frames(solver, PreviousStart())
    both = evaluations_of_frames(solver, PreviousStart(history=True))
    assert cold[0] == warm[0] == both[0]
    assert sum(both[1:]) < 0.8 * sum(warm[1:]) and sum(warm[1:]) < sum(cold[1:])
    copied = copy.deepcopy(PreviousStart(history=True))
    assert evaluations_of_frames(solver, copied) == both
    plain = FixedPointIteration(max_iter=200, tol=1e-6)
    assert evaluations_of_frames(plain, PreviousStart(history=True)) == evaluations_of_frames(
        plain, PreviousStart()
    )


@pytest.mark.parametrize('memory', [3, 20])
@pytest.mark.parametrize('kind', [Anderson, LimitedMemoryBroyden])
def test_a_history_outgrows_the_budget_of_a_frame(kind, memory):
    solver, start = kind(max_iter=5, tol=0, memory=memory), PreviousStart(history=True)
    layer = ImplicitLayer(solver, JacobianFreeGradient(), start=start).eval()
    z0, used, residuals = torch.zeros(2, 40, dtype=torch.float64), [], []
    for f in frames():
        layer(f, z0)
        used.append(start.state(problem_of(f, z0), solver).used)
        residuals.append(float(layer.forward_stats.residual.max()))
    # Of five evaluations the first has no pair and the last needs none.
    assert used == [min(memory, n) for n in (3, 6, 9, 12, 15)]
    assert max(residuals[1:]) < 0.05 * residuals[0]


def test_a_history_is_that_of_the_same_solver_and_of_a_solve_that_did_not_fail():
    solver, start = LimitedMemoryBroyden(max_iter=60, tol=1e-6, memory=20), PreviousStart(True)
    layer = ImplicitLayer(solver, JacobianFreeGradient(), start=start).eval()
    *_, f = frames()
    z0 = torch.zeros(2, 40, dtype=torch.float64)

    def state(solver=solver, z0=z0):
        return start.state(problem_of(f, z0), solver)

    assert state() is None
    with torch.inference_mode():
        layer(f, z0)
    assert state().count == state().used > 0
    # Outside the mode that made them they could not be written to.
    assert not state().tests.is_inference()
    assert state(solver.replace(tol=1e-5)) is None and state(z0=z0[:1]) is None
    layer.train()(f, z0)
    assert state() is not None
    layer.eval()(lambda z: z / 0, z0)
    assert state() is None
    with pytest.raises(ValueError, match=r'go on with .*\(2, 40\).*\(1, 40\)'):
        solution = solve(f, z0, solver, keep_state=True)
        solve(f, z0[:1], solver, state=solution.state)
    with pytest.raises(ValueError, match='history must be True or False'):
        PreviousStart(history='yes')


def test_a_history_is_left_alone_where_a_gradient_needs_it():
    solver = LimitedMemoryBroyden(max_iter=60, tol=1e-6, memory=20)
    start = PreviousStart(history=True)
    layer = ImplicitLayer(solver, SharedInverseGradient(steps=1), start=start).eval()
    for f in frames():
        weight = torch.ones(2, 40, dtype=torch.float64, requires_grad=True)
        z0 = torch.zeros_like(weight)
        layer(lambda z, f=f, weight=weight: f(z * weight), z0).sum().backward()
        assert start.state(problem_of(f, z0), solver) is None and weight.grad.any()


def test_previous_start_serves_a_function():
    layer = ImplicitLayer(Anderson(tol=1e-5), JacobianFreeGradient(), start=PreviousStart()).eval()

    def evaluations():
        layer(torch.cos, torch.zeros(1, 3))
        return layer.forward_stats.num_iter.item()

    first = evaluations()
    assert evaluations() == 1 < first
    layer.start.reset()
    assert evaluations() == first
