"""What moved from one frame of a video to the next, and a state that moves along."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Side, in pixels, of the squares that are compared.
_WINDOW = 9


def motion_between(before: Tensor, now: Tensor, reach: int) -> Tensor:
    """Where the surroundings of each pixel of ``now`` were in ``before``, by block matching.

    Of the displacements by whole pixels it takes the one whose squares differ least, none at all
    where that is as good, and refines it by the vertex of a paraboloid through its neighbours.

    Args:
        before (Tensor): (N, C, H, W).
        now (Tensor): (N, C, H, W).
        reach (int): Largest displacement in each direction, in pixels.

    Returns:
        (N, 2, H, W), rows and columns: what is at x now was at x + motion.
    """
    height, width = now.shape[2:]
    # One more on each side, so that every candidate has neighbours.
    border = reach + 1
    padded = F.pad(before, (border,) * 4, mode='replicate')
    side = 2 * border + 1
    costs = []
    for row in range(side):
        for column in range(side):
            moved = padded[:, :, row : row + height, column : column + width]
            difference = (moved - now).square().mean(1, keepdim=True)
            costs.append(_mean_around(difference))
    cost = torch.cat(costs, 1)

    inside = torch.zeros(side, side, dtype=torch.bool, device=now.device)
    inside[1:-1, 1:-1] = True
    candidates = cost.masked_fill(~inside.view(1, -1, 1, 1), torch.inf)
    least, best = candidates.min(1, keepdim=True)
    still = side * border + border
    best = torch.where(cost[:, still : still + 1] <= least, still, best)
    whole = torch.cat([best // side - border, best % side - border], 1)
    return whole + _vertex(cost, best, side)


def _mean_around(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, _WINDOW, 1, _WINDOW // 2, count_include_pad=False)


def _vertex(cost: Tensor, best: Tensor, side: int) -> Tensor:
    """How far from the best candidate the least cost is, (N, 2, H, W) within half a pixel."""

    def at(row: int, column: int) -> Tensor:
        return cost.gather(1, best + row * side + column)

    least = at(0, 0)
    slope = [(at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2]
    bend = [at(1, 0) - 2 * least + at(-1, 0), at(0, 1) - 2 * least + at(0, -1)]
    twist = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = bend[0] * bend[1] - twist.square()
    offset = [
        (twist * slope[1] - bend[1] * slope[0]) / determinant,
        (twist * slope[0] - bend[0] * slope[1]) / determinant,
    ]
    # A perfect match is where it is, and without a minimum there is nothing to refine.
    known = (least > 0) & (determinant > 0)
    return torch.where(known, torch.cat(offset, 1), 0.0).clamp(-0.5, 0.5)


def moved_along(features: Tensor, motion: Tensor) -> Tensor:
    """Feature maps (N, C, H, W) after a motion (N, 2, H', W') that was found at another resolution.

    Beyond the edge they go on as at the edge.
    """
    height, width = features.shape[2:]
    scale = [features.shape[i] / motion.shape[i] for i in (2, 3)]
    motion = F.interpolate(motion, size=(height, width), mode='bilinear', align_corners=False)
    rows, columns = (
        (2 * (torch.arange(n, device=motion.device).view(shape) + k * part) + 1) / n - 1
        for n, shape, k, part in zip(
            (height, width), ((-1, 1), (1, -1)), scale, motion.unbind(1), strict=True
        )
    )
    grid = torch.stack([columns, rows], -1).to(features.dtype)
    return F.grid_sample(features, grid, padding_mode='border', align_corners=False)
