"""The long-vector operations of secant solvers on a CPU, reading each vector once."""

import torch
from torch import Tensor

from ..deq.solvers.products import Products


class CppProducts(Products):
    """:class:`~mdeq_mm.deq.solvers.products.Products` in C++.

    For float32 states with a history in float32 or bfloat16, and for float64 states. Sums are taken
    over fixed blocks of a sample, so they depend neither on threads nor on the batch.
    """

    def residual(self, fz: Tensor, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.mdeq_mm.secant_residual(fz.contiguous(), z.contiguous(), g)

    def remember(
        self,
        tests: Tensor,
        images: Tensor,
        slot: int,
        used: int,
        s: Tensor,
        g: Tensor,
        last_g: Tensor,
        mixing: float,
        test_with_steps: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.mdeq_mm.secant_remember(
            tests, images, slot, used, s.contiguous(), g, last_g, mixing, test_with_steps
        )

    def combine(
        self, images: Tensor, weights: Tensor, g: Tensor, mixing: float, step: Tensor, rows: bool
    ) -> Tensor | None:
        products = torch.ops.mdeq_mm.secant_combine(images, weights, g, mixing, step, rows)
        return products if rows else None
