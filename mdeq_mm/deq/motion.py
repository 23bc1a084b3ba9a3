"""What moved from one frame of a video to the next, and a state that moves along."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Side, in pixels, of the squares that are compared.
_WINDOW = 9


def motion_between(before: Tensor, now: Tensor, reach: int) -> Tensor:
    """Where the surroundings of each pixel of ``now`` were in ``before``, by block matching.

    Of the displacements by whole pixels it takes the one whose squares differ least, none at all
    where that is as good.

    Args:
        before (Tensor): (N, 1, H, W).
        now (Tensor): (N, 1, H, W).
        reach (int): Largest displacement in each direction, in pixels. Time and memory grow with
            its square.

    Returns:
        (N, 2, H, W), rows and columns: what is at x now was at x + motion.
    """
    side = 2 * reach + 1
    padded = F.pad(before, (reach,) * 4, mode='replicate')
    moved = padded[:, 0].unfold(1, now.shape[2], 1).unfold(2, now.shape[3], 1)
    cost = _sum_around((moved - now[:, :, None]).square().flatten(1, 2))
    cost = cost.nan_to_num(nan=torch.inf)
    least, best = cost.min(1, keepdim=True)
    still = side * reach + reach
    best = torch.where(cost[:, still : still + 1] <= least, still, best)
    return torch.cat([best // side - reach, best % side - reach], 1).to(now.dtype)


def _sum_around(x: Tensor) -> Tensor:
    """Sums over the square around each pixel; those of zeros are zero. torch's pooling is slow."""
    x = F.pad(x, (_WINDOW // 2,) * 4, mode='replicate')
    for dim in (2, 3):
        size = x.shape[dim] - _WINDOW + 1
        x = sum(x.narrow(dim, k, size) for k in range(_WINDOW))
    return x


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
