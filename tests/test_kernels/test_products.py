"""The long-vector work of secant solvers in C++ against torch's operators."""

import pytest
import torch

from mdeq_mm.deq import Anderson, LimitedMemoryBroyden, Status, solve
from mdeq_mm.deq.solvers.products import Products, products_for
from mdeq_mm.kernels import extension
from mdeq_mm.kernels.products import CppProducts

from ..checks import assert_same
from ..problems import affine_contraction

pytestmark = pytest.mark.skipif(
    extension.load() is not None, reason=f'no C++ operations: {extension.load()}'
)

CASES = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.float32, torch.bfloat16, 1e-5),
]
each_dtype = pytest.mark.parametrize('dtype, history, rtol', CASES)
# One value, less than a register, several blocks and a rest.
sizes = pytest.mark.parametrize('d', [1, 7, 2048, 5003])


def close(got, wanted, rtol):
    scale = wanted.double().abs().max().clamp(min=1e-30)
    assert ((got.double() - wanted.double()).abs().max() / scale).item() <= rtol


@each_dtype
@sizes
@pytest.mark.parametrize('test_with_steps', [False, True])
@pytest.mark.parametrize('n', [0, 1, 3])
def test_a_pair_and_its_products(dtype, history, rtol, d, test_with_steps, n):
    generator = torch.Generator().manual_seed(d)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tests, images = random(n, 4, d).to(history), random(n, 4, d).to(history)
    s, g, last_g = random(n, d), random(n, d), random(n, d)
    for used, slot in ((1, 0), (3, 2), (4, 1)):
        ours, theirs = ((tests.clone(), images.clone()) for _ in range(2))
        got = CppProducts().remember(*ours, slot, used, s, g, last_g, 0.7, test_with_steps)
        # In double precision from the pair as it is stored.
        Products().remember(*theirs, slot, used, s, g, last_g, 0.7, test_with_steps)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(
                a, b, rtol=rtol if history != torch.bfloat16 else 8e-3, atol=0
            )
        basis = ours[0][:, :used].double()
        y = (g - last_g).double()
        wanted = [torch.einsum('nkd,nd->nk', basis, v) for v in (g.double(), y)]
        wanted.append(basis[:, slot].norm(dim=1))
        for a, b in zip(got, wanted):
            assert a.shape == b.shape and a.dtype == dtype
            if n:
                close(a, b, rtol * d**0.5)


@each_dtype
@sizes
def test_a_step_and_its_products_with_the_images(dtype, history, rtol, d):
    generator = torch.Generator().manual_seed(d)
    images = torch.randn(3, 4, d, generator=generator, dtype=dtype).to(history)
    weights = torch.randn(3, 3, generator=generator, dtype=dtype)
    g = torch.randn(3, d, generator=generator, dtype=dtype)
    step = torch.full_like(g, float('nan'))
    rows = CppProducts().combine(images, weights, g, 0.6, step, True)
    basis = images[:, :3].double()
    wanted = 0.6 * g.double() - torch.einsum('nk,nkd->nd', weights.double(), basis)
    close(step, wanted, 10 * rtol)
    close(rows, torch.einsum('nkd,nd->nk', basis, step.double()), rtol * d**0.5)
    assert CppProducts().combine(images, weights, g, 0.6, step, False) is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@sizes
def test_a_residual_and_its_length(dtype, d):
    fz, z = torch.randn(3, d, dtype=dtype), torch.randn(3, d, dtype=dtype)
    fz[1, 0], z[2] = float('nan'), fz[2]
    g = torch.empty_like(z)
    norm_g, norm_f = CppProducts().residual(fz, z, g)
    assert_same(g[[0, 2]], (fz - z)[[0, 2]])
    assert g[1, 0].isnan()
    for got, wanted in ((norm_g, (fz - z).norm(dim=1)), (norm_f, fz.norm(dim=1))):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    assert norm_g[2] == 0


def test_infinities_are_seen():
    fz = torch.ones(2, 9)
    fz[1, 3] = float('inf')
    norm_g, norm_f = CppProducts().residual(fz, torch.zeros(2, 9), torch.empty(2, 9))
    assert norm_f.tolist() == [3.0, float('inf')] and norm_g[1] == float('inf')


def test_they_serve_the_dtypes_they_know_and_no_graph():
    plain = torch.zeros(1, 2)
    assert isinstance(products_for(plain), CppProducts)
    assert isinstance(products_for(plain, torch.bfloat16), CppProducts)
    assert isinstance(products_for(plain.double()), CppProducts)
    others = [(plain.half(), None), (plain.double(), torch.bfloat16), (plain, torch.float16)]
    others += [(plain.to('meta'), None), (plain.bfloat16(), None)]
    for z, history in others:
        assert type(products_for(z, history)) is Products


@pytest.mark.parametrize('make', [Anderson, LimitedMemoryBroyden])
@pytest.mark.parametrize('memory', [2, 20])
def test_a_solve_is_that_of_torchs_operators(make, memory, monkeypatch):
    problem = affine_contraction(n=5, d=300)
    solver = make(max_iter=60, tol=1e-9, memory=memory)
    ours = solve(problem.f, problem.start, solver)
    monkeypatch.setattr('mdeq_mm.deq.solvers.products._FASTER', {})
    theirs = solve(problem.f, problem.start, solver)
    assert set(ours.status.tolist()) == {Status.CONVERGED}
    assert_same(ours.num_iter, theirs.num_iter)
    torch.testing.assert_close(ours.z, theirs.z, rtol=1e-7, atol=1e-9)


def test_sums_depend_on_neither_batch_nor_threads():
    fz, z = torch.randn(6, 5000), torch.randn(6, 5000)
    alone = [
        CppProducts().residual(fz[i : i + 1], z[i : i + 1], torch.empty(1, 5000)) for i in range(6)
    ]
    torch.set_num_threads(2)
    together = CppProducts().residual(fz, z, torch.empty(6, 5000))
    for index in range(2):
        assert_same(together[index], torch.cat([part[index] for part in alone]))


def test_vectors_in_pieces_are_refused_or_put_together():
    strided = torch.zeros(5, 3).T
    with pytest.raises(RuntimeError, match='contiguous'):
        CppProducts().residual(torch.ones(3, 5), torch.ones(3, 5), strided)
    rate = torch.linspace(0.1, 0.9, 5)
    found = solve(lambda z: (rate * z + 1).T.contiguous().T, strided, Anderson(30, 1e-5))
    torch.testing.assert_close(found.z, (1 / (1 - rate)).expand(3, 5), rtol=1e-3, atol=1e-3)
