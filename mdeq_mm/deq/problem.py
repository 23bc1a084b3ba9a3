"""What solvers and gradients are given: f bound to one batch, as a function of a flat state."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .passes import bound, bound_function, is_sharded
from .solvers.base import at_least_float32

Shape = tuple[int, ...]
State = Tensor | Sequence[Tensor]


def pack(features: Sequence[Tensor], channels_last: bool = False) -> Tensor:
    """[(N, Ci, Hi, Wi)] -> (N, D), D the sum of CiHiWi.

    Args:
        features (Sequence[Tensor]): Feature maps of one batch.
        channels_last (bool): Lay each scale out as (Hi, Wi, Ci), which needs no transposition if
            the features are in that memory format.
    """
    if channels_last:
        features = [feature.permute(0, 2, 3, 1) for feature in features]
    return torch.cat([feature.flatten(1) for feature in features], dim=1)


def unpack(z: Tensor, shapes: Sequence[Shape], channels_last: bool = False) -> list[Tensor]:
    """(N, D) -> [(N, Ci, Hi, Wi)], the inverse of :func:`pack`, as views."""
    sizes = [c * h * w for c, h, w in shapes]
    if sum(sizes) != z.shape[1]:
        raise ValueError(f'{z.shape[1]} values a sample do not fill the shapes {list(shapes)}.')
    # One split, not a slice per scale: its gradient is one concatenation, while slices give
    # zero-filled states that have to be summed.
    features = []
    for part, (c, h, w) in zip(z.split(sizes, dim=1), shapes):
        if channels_last:
            features.append(part.unflatten(1, (h, w, c)).permute(0, 3, 1, 2))
        else:
            features.append(part.unflatten(1, (c, h, w)))
    return features


class Problem:
    """z = f(z) for one batch.

    Called with a state (N, D), it returns f of it in the dtype of :attr:`start`.

    Attributes:
        start (Tensor): (N, D) where a solve begins, unless the layer's ``start`` says otherwise.
        shapes (list): Shapes of the parts of the state, without N.
        separable (bool): Whether :meth:`rows` can give f for a subset of the samples.
        scene (Tensor | None): A map (N, C, H, W) of what f is bound to, if the state consists of
            maps of the same scene: :meth:`maps` is then a list of (N, Ci, Hi, Wi), as :meth:`flat`
            takes.
    """

    start: Tensor
    shapes: list[Shape]
    separable = False
    scene: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> 'Problem':
        """The problem of a subset of the samples, given by (K,) indices."""
        raise NotImplementedError

    def plain(self) -> 'Problem':
        """The same problem, computed by operators that can be differentiated twice."""
        return self

    def maps(self, z: Tensor) -> Any:
        """A state (N, D) in the structure that f takes, as views."""
        raise NotImplementedError

    def flat(self, maps: Any) -> Tensor:
        """The inverse of :meth:`maps`, (N, D) in the dtype of :attr:`start`."""
        raise NotImplementedError


class FunctionProblem(Problem):
    """A user's function of one tensor (N, ...) or of a sequence of them.

    Args:
        f: Takes and returns the structure of ``z0``: a tensor for a tensor, a sequence of tensors
            of the same shapes for a sequence. For a module, a method of one, or
            ``functools.partial`` of either, parametrized weights are computed once.
        z0 (Tensor | Sequence[Tensor]): Where to start. Parts in half precision reach f as such, but
            the solver keeps them in float32: in half precision the residual could not fall.

    Raises:
        TypeError, ValueError: If ``z0`` is neither, is not real and floating, or is empty. When
            called: if f returns another structure or other shapes, or changes its argument in
            place.
    """

    def __init__(self, f: Callable[[Any], Any], z0: State) -> None:
        if not callable(f):
            raise TypeError(f'f must be a function or a module, got {_describe(f)}.')
        self.f = bound_function(f)
        self.single = isinstance(z0, Tensor)
        parts = [z0] if self.single else z0
        _check_start(parts)
        self.kind = type(z0)
        self.shapes = _samples(parts)
        self.dtypes = [part.dtype for part in parts]
        dtype = torch.float32
        for other in self.dtypes:
            dtype = torch.promote_types(dtype, other)
        self.start = outside_inference(self._flat([part.to(dtype) for part in parts]))

    def __call__(self, z: Tensor) -> Tensor:
        states, version = self.maps(_shielded(z)), _version(z)
        try:
            out = self.f(states)
        except RuntimeError as error:
            remedy = _remedy(error, self)
            if remedy is None:
                raise
            raise RuntimeError(f'{remedy} torch says: {error}') from error
        _check_version(z, version)
        parts = self._checked(out)
        return self._flat([part.to(z.dtype) for part in parts])

    def _checked(self, out: Any) -> Sequence[Tensor]:
        """The parts of what f returned."""
        parts = [out] if self.single else out
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, Tensor) for p in parts):
            what = 'a tensor' if self.single else f'a sequence of {len(self.shapes)} tensors'
            raise TypeError(f'f was given {what} and must return the same, got {_describe(out)}.')
        if _samples(parts) != self.shapes:
            given, got = ([tuple(s) for s in shapes] for shapes in (self.shapes, _samples(parts)))
            raise ValueError(
                f'f was given {given} a sample and returned {got}: the shapes must be the same.'
            )
        return parts

    def maps(self, z: Tensor) -> State:
        return self._structured(z, copy=False)

    def copied_maps(self, z: Tensor) -> State:
        """:meth:`maps` in memory of their own, for a caller who may change them in place.

        In place on a view of f's output, the change would go past the hook that makes the gradient.
        """
        return self._structured(z, copy=True)

    def _structured(self, z: Tensor, copy: bool) -> State:
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = [
            part.reshape(z.shape[0], *shape).to(dtype, copy=copy)
            for part, shape, dtype in zip(z.split(sizes, dim=1), self.shapes, self.dtypes)
        ]
        if self.single:
            return parts[0]
        # A namedtuple takes its fields one by one.
        return self.kind(*parts) if hasattr(self.kind, '_fields') else self.kind(parts)

    def flat(self, maps: State) -> Tensor:
        return self._flat([maps] if self.single else maps).to(self.start.dtype)

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        flat = [p.reshape(p.shape[0], math.prod(s)) for p, s in zip(parts, self.shapes)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def problem_of(f: Problem | Callable[[Any], Any], z0: State | None = None) -> Problem:
    """The problem that an implicit layer called with ``f`` and ``z0`` solves.

    Raises:
        TypeError: If ``f`` is a function and ``z0`` is missing.
    """
    if isinstance(f, Problem):
        return f
    if z0 is None:
        raise TypeError('ImplicitLayer: z0 is missing. A function has no start of its own.')
    return FunctionProblem(f, z0)


def outside_inference(z: Tensor) -> Tensor:
    """``z``, copied if it comes from an inference mode that has ended: autograd refuses those."""
    return z.clone() if z.is_inference() and not torch.is_inference_mode_enabled() else z


def _shielded(z: Tensor) -> Tensor:
    """What f may be given of the iterate ``z``: in inference mode a copy.

    torch counts no changes of inference tensors, so an f that works in place could not be refused.
    """
    return z.clone() if z.is_inference() else z


def _version(z: Tensor) -> int | None:
    """How often ``z`` was changed in place; None if torch does not count."""
    return None if z.is_inference() or torch.compiler.is_compiling() else z._version


def _check_version(z: Tensor, version: int | None) -> None:
    if version is not None and z._version != version:
        raise RuntimeError(
            'f changed its argument in place, which is the iterate of the solver. Look for '
            'operations such as relu_() or nn.ReLU(inplace=True) on the state, and make the first '
            'of them return a new tensor.'
        )


def caching() -> bool:
    """Whether the caller is inside ``torch.nn.utils.parametrize.cached()``."""
    return bool(getattr(parametrize, '_cache_enabled', 0))


def _check_start(parts: Any) -> None:
    if not isinstance(parts, (list, tuple)) or not parts:
        raise TypeError(
            f'z0 must be a tensor, or a list or tuple of tensors, got {_describe(parts)}.'
        )
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f'z0 must hold tensors, got {_describe(part)}.')
        if not part.is_floating_point():
            raise ValueError(
                f'z0 must be real and floating, got {part.dtype}. Convert it: z0.float(), or '
                'torch.view_as_real(z0) for a complex state.'
            )
        if part.dim() == 0 or 0 in part.shape[1:]:
            raise ValueError(
                f'z0 must be (N, ...) with at least one value a sample, got {tuple(part.shape)}.'
            )
        if part.shape[0] != parts[0].shape[0]:
            sizes = [part.shape[0] for part in parts]
            raise ValueError(f'All parts of z0 must have one batch size, got {sizes}.')


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return 'a tensor'
    size = f' of {len(value)}' if isinstance(value, (list, tuple)) else ''
    return f'{type(value).__name__}{size}'


def _samples(parts: Sequence[Tensor]) -> list[torch.Size]:
    """Shapes without N."""
    return [part.shape[1:] for part in parts]


def _remedy(error: RuntimeError, problem: FunctionProblem) -> str | None:
    """What to do about torch errors that a user's f often raises; None for others."""
    text = str(error)
    if 'does not require grad' in text:
        return (
            'f was called without grad and differentiates something: a solve runs under '
            'torch.no_grad(). Let f begin with torch.enable_grad() and a state that requires '
            'grad, and create_graph=True where it is trained.'
        )
    if any(word in text for word in ('dtype', 'scalar type', 'bias type', 'weight type')):
        dtypes = ', '.join(str(dtype) for dtype in problem.dtypes)
        return f'f was given a state of {dtypes}, the dtype of z0. Give z0 the dtype f computes in.'
    return None


def _dtype_of_weights(cell: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of the cell's weights during its calls.

    ``default`` if that is unknown: the cell has no parameters, or FSDP holds them and may cast them
    for each call.
    """
    if any(is_sharded(module) for module in cell.modules()):
        return default
    return next((p.dtype for p in cell.parameters() if p.is_floating_point()), default)


class CellProblem(Problem):
    """A cell bound to the injection of one batch.

    Args:
        cell (nn.Module): ``cell(states, injection) -> states``, [(N, Ci, Hi, Wi)] in and out, and
            ``cell.state_shapes(injection) -> [(Ci, Hi, Wi)]``.
        injection (Tensor): (N, ...) the cell's second argument.
        channels_last (bool): Store states with channels last.
        call: Used instead of calling the cell: ``call(cell, states, injection)``.
    """

    def __init__(
        self,
        cell: nn.Module,
        injection: Tensor,
        channels_last: bool = False,
        call: Callable[..., Sequence[Tensor]] | None = None,
    ) -> None:
        self.cell = bound(cell)
        self.injection, self.channels_last, self.call = injection, channels_last, call
        self.shapes = [tuple(shape) for shape in cell.state_shapes(injection)]
        weights = _dtype_of_weights(cell, injection.dtype)
        # In half precision a residual could not fall: the state has at least float32, and only the
        # cell's arguments have the dtype of its weights.
        dtype = at_least_float32(torch.promote_types(weights, injection.dtype))
        self.given = weights if at_least_float32(weights) != weights else dtype
        size = sum(c * h * w for c, h, w in self.shapes)
        self.start = injection.new_zeros(injection.shape[0], size, dtype=dtype)

    def __call__(self, z: Tensor) -> Tensor:
        version, given = _version(z), _shielded(z).to(self.given)
        states = unpack(given, self.shapes, self.channels_last)
        if self.call is None:
            out = self.cell(states, self.injection)
        else:
            out = self.call(self.cell, states, self.injection)
        _check_version(z, version)
        if [tuple(o.shape[1:]) for o in out] != self.shapes:
            raise ValueError(
                f'{type(self.cell).__name__} returned maps of {[tuple(o.shape[1:]) for o in out]} '
                f'and its state_shapes says {self.shapes}: the two must be equal.'
            )
        return pack(out, self.channels_last).to(z.dtype)

    @property
    def scene(self) -> Tensor | None:
        return self.injection if self.injection.dim() == 4 else None

    @property
    def separable(self) -> bool:
        # A dropout mask belongs to the whole batch.
        return not any(module.training for module in self.cell.modules())

    def rows(self, index: Tensor) -> 'CellProblem':
        part = copy(self)
        part.injection, part.start = self.injection[index], self.start[index]
        return part

    def plain(self) -> 'CellProblem':
        part = copy(self)
        part.call = None
        return part

    def maps(self, z: Tensor) -> list[Tensor]:
        """(N, D) -> [(N, Ci, Hi, Wi)], views in the dtype of ``z``."""
        return unpack(z, self.shapes, self.channels_last)

    def flat(self, maps: Sequence[Tensor]) -> Tensor:
        return pack(maps, self.channels_last).to(self.start.dtype)
