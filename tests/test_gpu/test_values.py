"""Values and gradients on a GPU: those of the CPU, of the other layout, kernel and compilation."""

import pytest
import torch

from mdeq_mm.deq import Anderson, FixedPointIteration, LimitedMemoryBroyden, Status, solve

from ..checks import assert_same
from ..test_models.test_forward_pass import GRADIENTS
from ..test_robustness import SOLVERS
from . import assert_near, backbone, gradients, image, on_gpu

KINDS = (FixedPointIteration, Anderson, LimitedMemoryBroyden)


class Tanh:
    """z -> tanh(A z + b) / 2 with another A of norm 1 for each row: a contraction."""

    def __init__(self, device, dtype, n=5, d=40):
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(n, d, d, generator=generator, dtype=torch.float64)
        a /= torch.linalg.matrix_norm(a, 2)[:, None, None]
        b = torch.randn(n, d, generator=generator, dtype=torch.float64)
        self.a, self.b = (t.to(device, dtype) for t in (a, b))

    def __call__(self, z):
        return torch.tanh(torch.einsum('nij,nj->ni', self.a, z) + self.b) / 2


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('tol', [1e-9, 0])
def test_a_solve_in_float64_is_that_of_the_cpu(kind, tol, device):
    """Iterate for iterate: counts, trace and status are equal, too."""
    there, here = (
        solve(f, torch.zeros_like(f.b), kind(max_iter=14, tol=tol))
        for f in (Tanh(device, torch.float64), Tanh('cpu', torch.float64))
    )
    for name in ('num_iter', 'status'):
        assert_same(getattr(there, name).cpu(), getattr(here, name), name)
    assert_near([there.z], [here.z], 1e-10)
    # Near the end a residual is only rounding.
    torch.testing.assert_close(there.trace.cpu(), here.trace, rtol=1e-4, atol=1e-12)
    assert there.z.device.type == torch.device(device).type


@pytest.mark.parametrize('kind', KINDS)
def test_a_solve_in_float32_finds_the_solution_of_the_cpu(kind, device):
    f, exact = Tanh(device, torch.float32), Tanh('cpu', torch.float64)
    wanted = solve(exact, torch.zeros_like(exact.b), LimitedMemoryBroyden(max_iter=80, tol=1e-13)).z
    found = solve(f, torch.zeros_like(f.b), kind(max_iter=60, tol=1e-6))
    assert set(found.status.tolist()) == {Status.CONVERGED}
    assert_near([found.z], [wanted], 1e-5)


@pytest.mark.parametrize('history', ['bfloat16', 'float16'])
@pytest.mark.parametrize('kind', KINDS[1:])
def test_a_history_in_half_precision_converges(kind, history, device):
    f, exact = Tanh(device, torch.float32), Tanh('cpu', torch.float64)
    wanted = solve(exact, torch.zeros_like(exact.b), LimitedMemoryBroyden(max_iter=80, tol=1e-13)).z
    found = solve(f, torch.zeros_like(f.b), kind(max_iter=60, tol=1e-5, history_dtype=history))
    assert set(found.status.tolist()) == {Status.CONVERGED}
    assert_near([found.z], [wanted], 1e-4)


@pytest.mark.parametrize('gradient', GRADIENTS.values(), ids=GRADIENTS)
def test_every_gradient_in_float64_is_that_of_the_cpu(gradient, device):
    options = dict(max_iter=40, tol=1e-11, gradient=gradient)
    there, here = (
        gradients(backbone(where, torch.float64, **options), image(where, dtype=torch.float64))
        for where in (device, 'cpu')
    )
    assert_near(there, here, 1e-7)


@pytest.mark.parametrize('kind', SOLVERS)
def test_skipping_what_is_solved_gives_the_same_maps(kind, device):
    x = image(device, batch=4, dtype=torch.float64)
    x[0] = 0
    options = dict(kind=kind, max_iter=60, tol=1e-8)
    nets = [backbone(device, torch.float64, skip_solved=skip, **options) for skip in (True, False)]
    with torch.no_grad():
        skipped, whole = (net.eval()(x) for net in nets)
    assert_near(skipped, whole, 1e-6)


def f_and_vjp(net, x, dtype=None):
    """f at a state other than zero, and its gradients by state and parameters."""
    with torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        problem = net.problem(x)
        generator = torch.Generator().manual_seed(2)
        maps = [
            torch.randn(m.shape, generator=generator).to(m) for m in problem.maps(problem.start)
        ]
        z = problem.flat(maps).requires_grad_()
        out = problem(z)
    weights = [torch.randn(m.shape, generator=generator).to(m) for m in problem.maps(out)]
    loss = sum((m * w).sum() for m, w in zip(problem.maps(out), weights))
    parameters = list(net.cell.parameters())
    dz, *rest = torch.autograd.grad(loss, [z, *parameters])
    return [*problem.maps(out), *problem.maps(dz), *rest]


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['float32', 'bf16'])
@pytest.mark.parametrize('size', [12, 13])
def test_memory_formats_agree(dtype, size, device):
    x = image(device, size)
    first, last = (
        f_and_vjp(backbone(device, channels_last=flag), x, dtype) for flag in (False, True)
    )
    assert_near(last, first, 1e-5 if dtype is None else 0.05)


@pytest.mark.parametrize('channels_last', [False, True])
def test_memory_formats_train_alike(channels_last, device):
    options = dict(max_iter=40, tol=1e-10)
    got = gradients(
        backbone(device, torch.float64, channels_last=channels_last, **options),
        image(device, dtype=torch.float64),
    )
    wanted = gradients(
        backbone('cpu', torch.float64, channels_last=False, **options),
        image('cpu', dtype=torch.float64),
    )
    assert_near(got, wanted, 1e-7)


@on_gpu
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16])
def test_the_compiled_norms_are_the_native_ones(dtype, channels_last, programs):
    for size in (12, 13):
        x = image('cuda', size)
        native, compiled = (
            f_and_vjp(backbone('cuda', norm_kernel=kernel, channels_last=channels_last), x, dtype)
            for kernel in ('native', 'compiled')
        )
        tolerance = {None: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
        assert_near(compiled, native, tolerance)


@on_gpu
@pytest.mark.parametrize('kernel', ['native', 'compiled'])
@pytest.mark.parametrize(
    'options', [True, dict(mode='reduce-overhead')], ids=['programs', 'CUDA graphs']
)
def test_a_compiled_cell_trains_as_the_cell_does(options, kernel, programs):
    """Its backward pass is repeated on one graph, and each batch brings another injection."""
    solver = dict(max_iter=8, tol=0)
    plain = backbone('cuda', **solver)
    compiled = backbone('cuda', compile_cell=options, norm_kernel=kernel, **solver)
    for round in range(4):
        x = image('cuda') * (1 + round)
        assert_near(gradients(compiled, x), gradients(plain, x), 1e-3)
    with torch.no_grad():
        for x in (image('cuda'), image('cuda', size=16)):
            assert_near(compiled.eval()(x), plain.eval()(x), 1e-3)


@on_gpu
def test_a_compiled_cell_under_autocast(programs):
    solver = dict(max_iter=8, tol=0)
    plain = backbone('cuda', **solver)
    compiled = backbone('cuda', compile_cell=True, **solver)
    with torch.autocast('cuda', dtype=torch.bfloat16):
        got, wanted = gradients(compiled, image('cuda')), gradients(plain, image('cuda'))
    assert_near(got, wanted, 0.1)
