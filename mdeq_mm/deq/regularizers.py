"""The size of f's Jacobian at the equilibrium: a penalty on it, and its spectral radius."""

import torch
from torch import Tensor

from ..options import check_int, check_number, immutable
from .solvers.base import Function, Part


@immutable
class JacobianRegularizer(Part):
    """``weight * E |v'J|^2 / D`` at z*, v ~ N(0, I): the mean square of the entries of v'J.

    Bai, Koltun & Kolter 2021, "Stabilizing equilibrium models by Jacobian regularization". The
    penalty uses the evaluation of f whose graph is kept anyway, by double backward. Its gradient is
    exact, whereas a finite difference would see every ReLU that its step crosses.

    Args:
        weight (float): Factor of the penalty.
        probability (float): Probability that a training pass has the penalty, drawn for each.
        samples (int): Number of vectors v; the penalty is the mean over them.
    """

    weight: float
    probability: float = 1.0
    samples: int = 1

    def __post_init__(self) -> None:
        name = 'JacobianRegularizer'
        check_number(name, 'weight', self.weight, 0)
        check_number(name, 'probability', self.probability, 0, 1)
        check_int(name, 'samples', self.samples, 1)

    def __call__(self, z: Tensor, out: Tensor) -> Tensor:
        """The penalty, a scalar with a graph; zero where f does not depend on z.

        Args:
            z (Tensor): (N, D) the equilibrium, a tensor that requires grad.
            out (Tensor): (N, D) f of it, with its graph.
        """
        total = out.new_zeros(())
        for _ in range(self.samples):
            v = torch.randn_like(out)
            vjp = None
            if out.requires_grad:
                (vjp,) = torch.autograd.grad(out, z, v, create_graph=True, allow_unused=True)
            if vjp is None:
                return total
            # A mean over the batch as well: the paper's D counts the whole batch.
            total = total + vjp.square().mean()
        return self.weight * total / self.samples


def spectral_radius(f: Function, z: Tensor, iterations: int = 50) -> Tensor:
    """Largest absolute eigenvalue of the Jacobian of f at z, per sample, by power iteration.

    Below 1, plain iteration converges near z. The growth of a vector is averaged over the second
    half of the iterations, so that a complex pair, under which it oscillates, is measured as well.

    Args:
        f: (N, ...) -> (N, ...), samples independent of each other; a problem or any function.
        z (Tensor): (N, ...) where; an equilibrium.
        iterations (int): Vector-Jacobian products.

    Returns:
        Tensor: (N,), 0 where f does not depend on z.
    """
    check_int('spectral_radius', 'iterations', iterations, 2)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        out = f(z)
    growth = []
    v = _normalized(torch.randn_like(z))[0]
    for _ in range(iterations):
        grad = None
        if out.requires_grad:
            (grad,) = torch.autograd.grad(out, z, v, retain_graph=True, allow_unused=True)
        if grad is None:
            return z.new_zeros(len(z))
        v, length = _normalized(grad)
        growth.append(length)
    late = torch.stack(growth[iterations // 2 :])
    return late.log().mean(dim=0).exp()


def _normalized(v: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` of length 1 per sample, and the lengths it had, (N,)."""
    length = torch.linalg.vector_norm(v.flatten(1), dim=1)
    scale = length.clamp(min=torch.finfo(v.dtype).tiny)
    return v / scale.view(-1, *[1] * (v.dim() - 1)), length
