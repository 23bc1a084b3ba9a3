"""The long-vector operations of a solve.

A state has some hundred thousand values and a history some ten states: the cost is how often they
are read. Here they are torch operators; :mod:`mdeq_mm.kernels` can replace them for a type of
device.
"""

import torch
from torch import Tensor


class Products:
    """By torch operators, for any device and dtype."""

    def residual(self, fz: Tensor, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``fz - z`` into ``g``, all (N, D); return the lengths of g and of fz, (N,)."""
        torch.sub(fz, z, out=g)
        return norm(g), norm(fz)

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
        """Write a pair into its slot and form the products that a secant method needs.

        Args:
            tests (Tensor): (N, m, D) test vectors; gets s or y.
            images (Tensor): (N, m, D) images; gets ``s + mixing y``.
            slot (int): Where the pair goes.
            used (int): Slots filled, this one included.
            s (Tensor): (N, D) the step, zero for a sample that is frozen.
            g (Tensor): (N, D) value after the step.
            last_g (Tensor): (N, D) value before it; y is the difference.
            mixing (float): Share of y in the image.
            test_with_steps (bool): Whether the test vector is s; else it is y.

        Returns:
            tuple: T'g and T'y, (N, used), and the length of the new test vector, (N,).
        """
        test, image = tests[:, slot], images[:, slot]
        y = g - last_g
        image.copy_(torch.add(s, y, alpha=mixing))
        test.copy_(s if test_with_steps else y)
        # Both at once: the history is read once.
        on_g, on_y = project(tests[:, :used], torch.stack([g, y], dim=1)).unbind(1)
        return on_g, on_y, norm(test).to(on_g.dtype)

    def combine(
        self, images: Tensor, weights: Tensor, g: Tensor, mixing: float, step: Tensor, rows: bool
    ) -> Tensor | None:
        """Write ``mixing g - W c`` into ``step``, (N, D).

        Args:
            images (Tensor): (N, m, D), of which the first ``used`` count.
            weights (Tensor): (N, used) c.
            g (Tensor): (N, D).
            mixing (float): Share of g.
            step (Tensor): (N, D) where the result goes.
            rows (bool): Whether to return the products of the result with the images.

        Returns:
            Tensor | None: (N, used) those products.
        """
        basis = images[:, : weights.shape[1]]
        if not basis.dtype == weights.dtype == g.dtype:
            # A product takes one dtype, and the step must have that of g.
            torch.sub(mixing * g, combination(weights, basis).to(g.dtype), out=step)
        else:
            torch.baddbmm(
                g.unsqueeze(1),
                weights.unsqueeze(1),
                basis,
                beta=mixing,
                alpha=-1,
                out=step.unsqueeze(1),
            )
        return project(basis, step.unsqueeze(1)).squeeze(1) if rows else None


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and small systems for states of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def norm(rows: Tensor) -> Tensor:
    """(N, D) -> (N,) lengths, in at least float32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=at_least_float32(rows.dtype))


def project(basis: Tensor, vectors: Tensor) -> Tensor:
    """(N, k, D), (N, r, D) -> (N, r, k) inner products, in at least float32.

    The vectors are the left factor: on a CPU the product then runs at the speed of memory, four
    times as fast as with them on the right.
    """
    dtype = at_least_float32(vectors.dtype)
    if basis.dtype == torch.float16:
        # In float16 a sum of squares overflows beyond some 65,000 values.
        columns = [(column.float() * vectors.float()).sum(dim=2) for column in basis.split(1, 1)]
        return torch.stack(columns, dim=2).to(dtype)
    return torch.bmm(vectors.to(basis.dtype), basis.mT).to(dtype)


def combination(weights: Tensor, basis: Tensor) -> Tensor:
    """(N, k), (N, k, D) -> (N, D) in the dtype of the weights."""
    return torch.bmm(weights.to(basis.dtype).unsqueeze(1), basis).squeeze(1).to(weights.dtype)


def recording() -> bool:
    """Whether a graph is recorded that will run on other values: it cannot branch on them."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def in_transform() -> bool:
    """Whether a transform of torch.func, such as vmap or grad, is active."""
    return getattr(torch._C, '_are_functorch_transforms_active', lambda: False)()


_TORCH = Products()
_FASTER: dict[str, Products] = {}


def register_products(device: str, products: Products) -> None:
    """Use ``products`` for float32 and float64 states on a type of device."""
    _FASTER[device] = products


def products_for(z: Tensor, history: torch.dtype | None = None) -> Products:
    """The operations for states like ``z`` and a history of dtype ``history``.

    Torch operators where a graph is recorded (an export, a trace, a compiled call, fake tensors)
    and inside transforms of torch.func.
    """
    graph = torch.compiler.is_compiling() or recording()
    plain = type(z) is Tensor and not graph and not in_transform()
    pairs = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16))
    pairs += ((torch.float64, torch.float64),)
    if plain and (z.dtype, history or z.dtype) in pairs:
        return _FASTER.get(z.device.type, _TORCH)
    return _TORCH
