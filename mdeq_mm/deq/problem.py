"""The one place where multiscale features become a flat state."""

from typing import List, Sequence, Tuple

import torch
from torch import Tensor

Shape = Tuple[int, int, int]


def pack(features: Sequence[Tensor], channels_last: bool = False) -> Tensor:
    """[(N, Ci, Hi, Wi)] -> (N, D), D the sum of CiHiWi.

    Args:
        features (Sequence[Tensor]): Feature maps of one batch.
        channels_last (bool): Lay each scale out as (Hi, Wi, Ci), which costs no transposition
            where the features are in that memory format.
    """
    if channels_last:
        features = [feature.permute(0, 2, 3, 1) for feature in features]
    return torch.cat([feature.flatten(1) for feature in features], dim=1)


def unpack(z: Tensor, shapes: Sequence[Shape], channels_last: bool = False) -> List[Tensor]:
    """(N, D) -> [(N, Ci, Hi, Wi)], the inverse of :func:`pack`, as views."""
    features, start = [], 0
    for c, h, w in shapes:
        part = z[:, start : start + c * h * w]
        start += c * h * w
        if channels_last:
            features.append(part.unflatten(1, (h, w, c)).permute(0, 3, 1, 2))
        else:
            features.append(part.unflatten(1, (c, h, w)))
    if start != z.shape[1]:
        raise ValueError(f'{z.shape[1]} values a sample do not fill the shapes {list(shapes)}.')
    return features
