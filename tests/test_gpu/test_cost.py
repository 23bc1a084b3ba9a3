"""Memory and waiting: what a solve must not cost on a GPU."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from mdeq_mm.deq import Anderson, FixedPointIteration, LimitedMemoryBroyden, solve

from . import backbone, image, loss_of, on_gpu

# What torch says of a call that makes the host wait.
WAITS = 'called a synchronizing CUDA operation'
KINDS = (FixedPointIteration, Anderson, LimitedMemoryBroyden)


def peak(net, x):
    """Peak memory of a training step beyond what the net takes, in bytes."""
    for _ in range(2):
        # The second step reuses what the first one built.
        net.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(net(x)).backward()
    return torch.cuda.max_memory_allocated() - before


@on_gpu
@pytest.mark.parametrize('kind', ['FixedPointIteration', 'Anderson', 'LimitedMemoryBroyden'])
@pytest.mark.parametrize('autocast', [False, True], ids=['float32', 'bf16'])
def test_memory_is_flat_in_max_iter(kind, autocast):
    x = image('cuda', size=96, batch=4)

    def of(count, **options):
        memory = {} if kind == 'FixedPointIteration' else dict(memory=3)
        solver = dict(type=kind, max_iter=count, tol=0, **memory)
        gradient = dict(type='ImplicitGradient', solver=solver)
        net = backbone('cuda', solver=solver, gradient=gradient, channels=(32, 32), **options)
        with torch.autocast('cuda', dtype=torch.bfloat16, enabled=autocast):
            return peak(net, x)

    assert abs(of(24) / of(6) - 1) < 0.05
    # Layers that are unrolled cost a graph each.
    assert of(24, unrolled_layers=24) > 2 * of(6, unrolled_layers=6)


def slowly(z):
    """A contraction that no method solves to rounding in a dozen evaluations."""
    rate = torch.linspace(0.1, 0.9, z.shape[1], dtype=z.dtype, device=z.device)
    return rate * torch.cos(z) + 1


@contextmanager
def no_waiting():
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@on_gpu
def test_waiting_would_be_seen():
    z = torch.zeros(2, 20, device='cuda')
    with no_waiting(), pytest.raises(RuntimeError, match=WAITS):
        solve(slowly, z, Anderson(max_iter=5, tol=1e-9))


@on_gpu
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_a_solve_of_a_fixed_budget_never_waits(kind, dtype):
    z = torch.zeros(3, 500, device='cuda', dtype=dtype)
    # Libraries are loaded at their first call.
    wanted = solve(slowly, z, kind(max_iter=9, tol=0))
    with no_waiting():
        found = solve(slowly, z, kind(max_iter=9, tol=0))
    assert torch.equal(found.z, wanted.z) and found.trace.shape == (9, 3)


@on_gpu
@pytest.mark.parametrize('options', [{}, dict(norm_kernel='compiled')], ids=['native', 'compiled'])
@pytest.mark.parametrize('dtype', [None, torch.float16], ids=['float32', 'fp16'])
@pytest.mark.parametrize('drop_rate', [0, 0.2])
def test_a_training_step_of_a_fixed_budget_never_waits(options, dtype, drop_rate, programs):
    net, x = backbone('cuda', max_iter=6, tol=0, drop_rate=drop_rate, **options), image('cuda')
    amp = dict(dtype=dtype or torch.float16, enabled=dtype is not None)

    def step():
        with torch.autocast('cuda', **amp):
            maps = net(x)
        torch.autograd.backward(maps, [torch.ones_like(z) for z in maps])

    for _ in range(2):
        step()
    with no_waiting():
        step()


@on_gpu
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('check_every', [1, 4])
def test_a_solve_to_a_tolerance_waits_once_every_so_many_evaluations(kind, check_every):
    z = torch.zeros(2, 20, device='cuda', dtype=torch.float64)
    solver = kind(max_iter=12, tol=1e-12, check_every=check_every)
    solve(slowly, z, solver)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            found = solve(slowly, z, solver)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    waits = [warning for warning in said if WAITS in str(warning.message)]
    assert found.num_iter.max() == 12 and len(waits) == 12 // check_every
