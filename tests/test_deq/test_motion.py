"""What moved between two frames, and a warm start that moves along."""

import copy

import pytest
import torch
from torch import nn

from mdeq_mm.deq import (
    CellProblem,
    FixedPointIteration,
    ImplicitLayer,
    JacobianFreeGradient,
    PreviousStart,
)
from mdeq_mm.deq.motion import motion_between, moved_along

# Pixels from the edge at which all that is compared is in both frames.
EDGE = 9


def scene(seed=0, height=32, width=40):
    """(2, 1, H, W) of waves, which can be sampled anywhere, as a function of the place."""
    gen = torch.Generator().manual_seed(seed)
    rate = 0.6 * torch.rand(2, 1, 8, 2, 1, 1, generator=gen) + 0.1
    phase = 6.3 * torch.rand(2, 1, 8, 1, 1, generator=gen)

    def at(rows=0.0, columns=0.0):
        y = torch.arange(height).view(-1, 1) + rows
        x = torch.arange(width) + columns
        return torch.sin(rate[:, :, :, 0] * y + rate[:, :, :, 1] * x + phase).sum(2)

    return at


def inner(x):
    return x[..., EDGE:-EDGE, EDGE:-EDGE]


@pytest.mark.parametrize('rows, columns', [(1, -2), (-2, 2), (0, 1), (0, 0)])
def test_whole_pixels_are_found_exactly(rows, columns):
    at = scene()
    motion = inner(motion_between(at(), at(rows, columns), 2))
    assert (motion[:, 0] == rows).all() and (motion[:, 1] == columns).all()


def test_samples_and_regions_have_motions_of_their_own():
    at, other = scene(), scene(1)
    left = torch.arange(40) < 20
    before = torch.where(left, at(), other())
    now = torch.where(left, at(1, 0), other(0, -1))
    now[1] = before[1]
    motion = motion_between(before, now, 1)
    assert (motion[0, :, 9:-9, 9:12] == torch.tensor([1.0, 0.0]).view(2, 1, 1)).all()
    assert (motion[0, :, 9:-9, 27:30] == torch.tensor([0.0, -1.0]).view(2, 1, 1)).all()
    assert not motion[1].any()


def test_nothing_moves_where_nothing_can_be_seen():
    flat = torch.full((1, 1, 12, 12), 3.0)
    assert not motion_between(flat, flat, 3).any()
    assert not motion_between(flat, flat + 1, 3).any()
    assert not motion_between(scene()(), scene()(), 3).any()


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_move(value):
    before, now = scene()(), scene()(1, 0)
    before[0, 0, 16, 20] = now[1, 0, 16, 20] = value
    motion = motion_between(before, now, 2)
    assert motion.isfinite().all() and not motion[:, :, 16, 20].any()


@pytest.mark.parametrize('size', [(1, 1), (2, 9)])
def test_a_map_smaller_than_the_search(size):
    maps = torch.rand(2, 3, *size)
    motion = motion_between(maps[:, :1], maps[:, :1].flip(3), 4)
    assert motion.shape == (2, 2, *size) and motion.isfinite().all()
    assert moved_along(maps, motion).isfinite().all()


def test_maps_of_each_scale_move_by_their_part():
    at = scene()
    motion = torch.tensor([2.0, -4.0]).view(1, 2, 1, 1).expand(2, 2, 64, 80)
    # At half the resolution it is half as far.
    torch.testing.assert_close(inner(moved_along(at(), motion)), inner(at(1, -2)))
    torch.testing.assert_close(moved_along(at(), torch.zeros_like(motion)), at())


class Slow(nn.Module):
    """z = 0.9 z + x at two resolutions: many steps, as far from its start as that is from it."""

    def state_shapes(self, injection):
        channels, height, width = injection.shape[1:]
        return [(channels, height, width), (channels, height // 2, width // 2)]

    def forward(self, states, injection):
        coarse = nn.functional.avg_pool2d(injection, 2)
        return [0.9 * z + x for z, x in zip(states, (injection, coarse), strict=True)]


def spot(row, column):
    """A frame (1, 1, 32, 40), dark but for a spot of even place and size."""
    frame = torch.zeros(1, 1, 32, 40)
    frame[..., row : row + 6, column : column + 6] = torch.arange(1.0, 37).view(6, 6)
    return frame


@pytest.fixture
def layer():
    solver = FixedPointIteration(max_iter=300, tol=1e-4)
    return ImplicitLayer(solver, JacobianFreeGradient(), PreviousStart(motion=4)).eval()


def evaluations(layer, frame, channels_last=False):
    problem = CellProblem(Slow(), frame, channels_last)
    fine, coarse = layer(problem)
    torch.testing.assert_close(fine, 10 * frame, rtol=0, atol=1.0)
    torch.testing.assert_close(coarse, 10 * nn.functional.avg_pool2d(frame, 2), rtol=0, atol=1.0)
    return layer.forward_stats.num_iter.item()


@pytest.mark.parametrize('channels_last', [False, True])
def test_an_equilibrium_that_moved_is_where_it_is_looked_for(channels_last, layer):
    first = evaluations(layer, spot(10, 12), channels_last)
    assert evaluations(layer, spot(12, 16), channels_last) < 3
    layer.start = PreviousStart()
    evaluations(layer, spot(10, 12), channels_last)
    assert 0.5 * first < evaluations(layer, spot(12, 16), channels_last)


def test_the_motion_is_followed_from_frame_to_frame_and_begins_anew(layer):
    first = evaluations(layer, spot(4, 4))
    assert max(evaluations(layer, spot(4 + 2 * k, 4 + 4 * k)) for k in (1, 2, 3)) < 3
    # Training has no part in it.
    layer.train()(CellProblem(Slow(), spot(20, 30)))
    assert evaluations(layer.eval(), spot(10, 20)) < 3
    assert evaluations(layer, spot(10, 16)[..., :36]) == first
    copied = copy.deepcopy(layer)
    assert copied.start == PreviousStart(motion=4) and evaluations(copied, spot(4, 4)) == first
    layer.start.reset()
    assert evaluations(layer, spot(4, 4)) == first


def test_a_frame_is_remembered_as_it_was(layer):
    frame = spot(10, 12)
    evaluations(layer, frame)
    frame.copy_(spot(12, 16))
    assert evaluations(layer, frame) < 3


def test_channels_may_cancel(layer):
    first, second = (spot(row, column) for row, column in ((10, 12), (12, 16)))
    evaluations(layer, torch.cat([first, -first], 1))
    assert evaluations(layer, torch.cat([second, -second], 1)) < 3


def test_frames_in_inference_mode_and_with_a_graph(layer):
    with torch.inference_mode():
        evaluations(layer, spot(10, 12))
    frame = spot(12, 16).requires_grad_()
    fine, _ = layer(CellProblem(Slow(), frame))
    (gradient,) = torch.autograd.grad(fine.sum(), frame)
    assert layer.forward_stats.num_iter.item() < 3 and (gradient == 1).all()
    # No graph of a frame is kept for the next.
    assert not layer.start._last.scene.requires_grad


class Vector(nn.Module):
    """z = 0.5 z + x of an injection without a place: (N, 4)."""

    def state_shapes(self, injection):
        return [(4, 1, 1)]

    def forward(self, states, injection):
        return [0.5 * states[0] + injection[:, :, None, None]]


def test_a_cell_without_a_map_has_no_scene_to_move_in(layer):
    problem = CellProblem(Vector(), torch.rand(2, 4))
    assert problem.scene is None
    layer(problem)
    layer(problem)
    assert (layer.forward_stats.num_iter == 1).all()


def test_a_function_has_no_scene_to_move_in():
    layer = ImplicitLayer(
        FixedPointIteration(max_iter=100), JacobianFreeGradient(), PreviousStart(motion=2)
    ).eval()
    z0 = torch.zeros(1, 3)
    first = layer(torch.cos, z0)
    torch.testing.assert_close(layer(torch.cos, z0), first, rtol=0, atol=1e-3)
    assert layer.forward_stats.num_iter.item() == 1
