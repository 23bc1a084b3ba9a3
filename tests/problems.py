"""Fixed-point problems with known solutions, to test any solver and gradient against."""

import math
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor


@dataclass
class Problem:
    """``f`` maps (N, D) to (N, D), with the fixed point ``solution``."""

    f: Callable[[Tensor], Tensor]
    solution: Tensor

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.solution)


def affine_contraction(n: int = 8, d: int = 24, norm: float = 0.9, seed: int = 0) -> Problem:
    """z -> A z + b, another A of spectral norm ``norm`` for each row."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, d, generator=generator, dtype=torch.float64)
    a = norm * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    b = torch.randn(n, d, generator=generator, dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(d, dtype=torch.float64) - a, b)
    return Problem(lambda z: torch.einsum('nij,nj->ni', a[: len(z)], z) + b[: len(z)], solution)


def cosine(n: int = 3, d: int = 5) -> Problem:
    """z -> cos z, whose fixed point is the Dottie number."""
    dottie = 0.7390851332151607
    return Problem(torch.cos, torch.full((n, d), dottie, dtype=torch.float64))


def rotation(n: int = 2) -> Problem:
    """A quarter turn about (1, 2): plain iteration circles forever."""
    center = torch.tensor([1.0, 2.0], dtype=torch.float64)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    return Problem(lambda z: (z - center) @ turn.T + center, center.expand(n, 2).clone())


def expanding_root(n: int = 2) -> Problem:
    """z -> z + (z^2 - 2): |f'| > 1 at its positive fixed point sqrt(2), so iteration leaves it."""
    solution = torch.full((n, 1), math.sqrt(2), dtype=torch.float64)
    return Problem(lambda z: z + z * z - 2, solution)


def textbook_broyden(f: Callable[[Tensor], Tensor], z: Tensor, steps: int) -> list:
    """The iterates of Broyden's good method with a dense Jacobian, from B = -I; z is (D,)."""
    jacobian = -torch.eye(z.numel(), dtype=z.dtype)
    g, iterates = f(z) - z, [z]
    for _ in range(steps):
        step = torch.linalg.solve(jacobian, -g)
        z = z + step
        new_g = f(z) - z
        jacobian = jacobian + torch.outer(new_g - g - jacobian @ step, step) / (step @ step)
        g = new_g
        iterates.append(z)
    return iterates
