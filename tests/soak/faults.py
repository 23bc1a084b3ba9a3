"""Faults around a model, and what must hold nevertheless."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mdeq_mm.compat import UnsafeCheckpointError, verify_checkpoint
from mdeq_mm.deq.layer import SolverStats
from mdeq_mm.deq.solvers import Anderson, Solution, Solver, Status, solve
from mdeq_mm.registry import build_part

from ..checks import OLD_TORCH
from ..test_robustness import SOLVERS
from ..test_robustness.test_framework import loss_of
from ..test_robustness.test_hostile import Payload, cut
from .actions import compare_in_double, train
from .case import (
    Case,
    Violation,
    check_stats,
    draw_solver,
    is_finite,
    require,
    require_equal,
    require_finite_unless_reported,
)

INF, NAN = float('inf'), float('nan')


def spoil(image: Tensor, value: float | str) -> None:
    """Write the fault into one image, all of it for what stands as one value."""
    if value == 'pixel':
        image[0, 0, 0] = NAN
    elif value == 'huge':
        image.mul_(1e15)
    else:
        image.fill_(value)


def bad_image(value: float | str) -> Callable[[Case], None]:
    """One image of the batch is bad: the others are unaffected, and the step is flagged."""

    def fault(case: Case) -> None:
        bad = case.rng.randrange(len(case.images))
        mates = [i for i in range(len(case.images)) if i != bad]
        dirty = case.images.clone()
        spoil(dirty[bad], value)
        layer = case.backbone.implicit
        # What float16 cannot represent counts as infinite.
        seen = dirty.half() if case.precision == 'fp16 autocast' else dirty
        broken = not is_finite([seen])
        wanted, stats = case.features(), layer.forward_stats
        outs = case.features(dirty)
        # Bit for bit in every precision where the kernels see a batch of the same size.
        same_size = not layer.skip_solved
        if same_size:
            require_equal([o[mates] for o in outs], [w[mates] for w in wanted], 'a batch-mate')
        if layer.forward_stats is not None:
            now = layer.forward_stats
            check_stats(now, layer.current_solver)
            same = torch.equal(now.status[mates], stats.status[mates])
            require(same or not same_size, "a batch-mate's status")
            failed = now.status[bad] == int(Status.NON_FINITE)
            require(failed or not broken, f'status {now.status[bad]} of an image with {value}')
        require_finite_unless_reported([o[mates] for o in outs], None)
        require(not (broken and is_finite(outs)), 'a broken image passes for a finite one')
        if not broken:
            require_finite_unless_reported(outs, layer.forward_stats)
        # And those of a batch without it.
        compare_in_double(case, dirty, [mates])
        skipped_step(case, dirty, broken)

    return fault


def skipped_step(case: Case, images: Tensor, broken: bool) -> None:
    """Training on a bad batch: gradients are finite, or seen not to be and the step is skipped.

    Skipping includes the running statistics of batch norms.
    """
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    case.model.train()
    case.loss(images=images).backward()
    grads = [p.grad for p in case.model.parameters() if p.grad is not None]
    finite = bool(torch.isfinite(get_total_norm(grads, norm_type=INF)))
    stats = case.backbone.implicit.forward_stats
    reported = stats is not None and bool((stats.status == int(Status.NON_FINITE)).any())
    require(not (broken and finite), 'a broken image passes for a training step')
    half = case.precision == 'fp16 autocast'
    require(finite or broken or reported or half, 'finite images, gradients not finite')
    case.optimizer.zero_grad()
    case.model.load_state_dict(before)


def large_weights(case: Case) -> None:
    """All weights of the backbone times 100: f has no fixed point that iteration finds."""
    with torch.no_grad():
        for parameter in case.backbone.parameters():
            parameter.mul_(100)
    outs = case.features()
    layer = case.backbone.implicit
    check_stats(layer.forward_stats, layer.current_solver)
    half = case.precision == 'fp16 autocast'
    if not half:
        require_finite_unless_reported(outs, None)
    case.backbone.train()
    with case.autocast():
        outs = case.backbone(case.images)
    loss_of([out.to(case.dtype) for out in outs]).backward()
    exact = layer.backward_stats is not None
    grads = [p.grad for p in case.backbone.parameters()]
    # Truncated series and unrolled layers multiply Jacobians and may overflow: seen by the norm.
    require(is_finite(grads) or half or not exact, 'exact gradient not finite')


def constant_f(case: Case) -> None:
    """f is the same everywhere: all changes are parallel, Anderson's system is singular."""
    layer = case.backbone.implicit
    before = layer.solver, layer.eval_solver, layer.unrolled_layers
    calls, memory = case.rng.randint(2, 9), case.rng.choice((1, 3, 20))
    layer.solver = Anderson(calls, 1e-9, memory=memory, ridge=0.0)
    layer.eval_solver, layer.unrolled_layers = None, 0
    with torch.no_grad():
        for fusion in case.backbone.cell.fusions:
            fusion.norm.weight.zero_()
            fusion.norm.bias.normal_()
    case.check()
    status = layer.forward_stats.status
    require((status == int(Status.CONVERGED)).all(), f'constant f, status {status.tolist()}')
    layer.solver = layer.solver.replace(damping=0.3)
    case.check()
    layer.solver, layer.eval_solver, layer.unrolled_layers = before


def small_problems(case: Case) -> None:
    """Fewer unknowns than memory, and no fixed point at all, for every solver."""
    d, scale = case.rng.randint(1, 3), case.rng.choice((1e-12, 1.0, 1e12))
    shift = scale * torch.randn(3, d, dtype=torch.float64)
    functions = (
        lambda z, rows=slice(None): 0.5 * z + shift[rows],
        lambda z, rows=slice(None): 0.0 * z + shift[rows],
        lambda z, rows=slice(None): z + shift[rows],
        lambda z, rows=slice(None): z * z + 1,
    )
    for kind in SOLVERS:
        cfg = dict(draw_solver(case.rng, (kind,)), max_iter=30)
        if 'memory' in cfg:
            cfg['memory'] = 10
        solver = build_part(cfg, Solver)
        for f in functions:
            both = solve(f, torch.zeros(3, d, dtype=torch.float64), solver)
            check_solution(both, f, solver)
            fewer = solve(f, both.z * 0, solver, f_of_rows=lambda rows, f=f: lambda z: f(z, rows))
            require_equal([fewer.z], [both.z], f'{solver} without the solved rows')
            for row in range(3):
                rows = slice(row, row + 1)
                alone = solve(
                    lambda z, f=f, rows=rows: f(z, rows),
                    torch.zeros(1, d, dtype=torch.float64),
                    solver,
                )
                # torch 2.9 rounds the products of another batch in another order.
                rtol = 1e-6 if OLD_TORCH else 0
                require_equal([alone.z], [both.z[rows]], f'row {row} of {solver}', rtol)


def check_solution(found: Solution, f: Callable, solver: Solver) -> None:
    """A solution is finite and its residual is that of the iterate it returns."""
    check_stats(SolverStats.of(found), solver)
    require(is_finite([found.z, found.residual]), f'{solver}: {found.z}')
    image = f(found.z)
    residual = (image - found.z).norm(dim=1) / image.norm(dim=1)
    close = torch.allclose(residual, found.residual, rtol=1e-6) or not residual.isfinite().all()
    require(close, f'{solver}: residual {found.residual.tolist()}, really {residual.tolist()}')


def one_evaluation(case: Case) -> None:
    """A budget of one evaluation in both passes."""
    layer = case.backbone.implicit
    before = layer.solver, layer.eval_solver, layer.gradient
    layer.solver = layer.solver.replace(max_iter=1)
    if layer.eval_solver is not None:
        layer.eval_solver = layer.eval_solver.replace(max_iter=1)
    if hasattr(layer.gradient, 'solver'):
        backward = layer.gradient.solver.replace(max_iter=1)
        layer.gradient = layer.gradient.replace(solver=backward)
    case.check()
    train(case)
    layer.solver, layer.eval_solver, layer.gradient = before


class Broken(Exception):
    """An exception that f raises in the middle of a solve."""


@contextlib.contextmanager
def counted(
    cell: nn.Module, in_backward: bool, raises: type[BaseException] = Broken, at: int = 0
) -> Iterator[list]:
    """Count calls of f, or vector-Jacobian products, and raise an error at one of them.

    Yields:
        A list that grows by one at each.
    """
    seen = []

    def count(*_: Any) -> None:
        seen.append(None)
        if len(seen) == at:
            # Made here: one made outside would tie its traceback to the graph this hook sits on,
            # a cycle that no collector sees.
            raise raises('injected')

    def hook(module: nn.Module, args: tuple, outs: list) -> None:
        if not in_backward:
            count()
        elif outs[0].requires_grad:
            outs[0].register_hook(count)

    handle = cell.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def interrupted(raises: type, in_backward: bool) -> Callable[[Case], None]:
    """An exception in some call of f, or in some product of the backward pass."""

    def fault(case: Case) -> None:
        seed = case.rng.getrandbits(32)
        twin = copy.deepcopy(case.model)
        with counted(twin.backbone.cell, in_backward) as calls:
            case.gradients(seed, twin)
        require(calls, 'no call of f to interrupt')
        at = case.rng.randint(1, len(calls))
        case.model.train()
        torch.manual_seed(seed)
        try:
            with counted(case.backbone.cell, in_backward, raises, at):
                case.loss().backward()
        except raises:
            return
        raise Violation(f'{raises.__name__} at call {at} of {len(calls)} was swallowed')

    return fault


def interrupted_optimizer(case: Case) -> None:
    """Ctrl-C between backward and the optimizer's step."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt('injected')

    handle = case.optimizer.register_step_pre_hook(stop)
    case.model.train()
    try:
        OptimWrapper(case.optimizer).update_params(case.loss())
    except KeyboardInterrupt:
        return
    finally:
        handle.remove()
    raise Violation('KeyboardInterrupt was swallowed')


#: Where a wrong value goes, and wrong values.
INVALID = (
    ('solver.max_iter', (0, -3, 2.5, '8', None, True, NAN)),
    ('solver.tol', (-1.0, 'small', NAN, None)),
    ('solver.memory', (0, -1, 1.5, None)),
    ('solver.damping', (0.0, 1.5, -1, NAN, 'half')),
    ('solver.ridge', (-1e-6, NAN, 'no')),
    ('solver.type', ('Andersen', 'MDEQBackbone', 7)),
    ('solver.max_iters', (5,)),
    ('gradient.type', ('Phantom', 'Anderson')),
    ('gradient.steps', (0, -2, 1.5, '3')),
    ('gradient.damping', (0.0, 2.0, NAN)),
    ('solver', ('Anderson', None, 5)),
    ('eval_solver', ('Anderson', 5, dict(max_iter=0), dict(type='Andersen'))),
    ('gradient', ('PhantomGradient', None)),
    ('channels', ((), (0,), (3.5,), (-4, 8), ('8',))),
    ('expansion', (0, -1, 2.5, '5')),
    ('stem_strides', ((), (0,), (2.0,))),
    ('in_channels', (0, '3')),
    ('drop_rate', (1.0, -0.1, NAN, 'low')),
    ('upsample', ('cubic', None, 3)),
    ('norm_cfg', (dict(type='BN'), dict(type='GN', num_groups=0), dict(type='GN', num_groups=7))),
    ('unrolled_layers', (-1, 1.5)),
    ('out_indices', ((9,), (), (-1,), (0.5,))),
    ('frozen_stages', (3, -2, 0.5)),
    ('dropout', (0.1,)),
)


def invalid_option(case: Case) -> None:
    """A wrong option is refused at construction, by an error that names option or value."""
    path, values = case.rng.choice(INVALID)
    value, (*parents, name) = case.rng.choice(values), path.split('.')
    cfg = copy.deepcopy(case.config['backbone'])
    if parents == ['solver']:
        cfg['solver'] = dict(type='LimitedMemoryBroyden', max_iter=3)
        if name in ('damping', 'ridge'):
            cfg['solver']['type'] = 'Anderson'
    elif parents == ['gradient']:
        cfg['gradient'] = dict(type='PhantomGradient')
    (cfg[parents[0]] if parents else cfg)[name] = value
    try:
        MODELS.build(cfg)
    except (ValueError, TypeError) as error:
        words = [repr(value), repr(name), f'{name} ']
        words += [repr(v) for v in value] if isinstance(value, tuple) else []
        words += [str(v) for v in value.values()] if isinstance(value, dict) else []
        require(any(word in str(error) for word in words), f'{path}={value!r}: {error}')
        return
    raise Violation(f'{path}={value!r} was accepted')


def damaged_file(case: Case) -> None:
    """A truncated file and one that carries code are refused, and the code is not run."""
    whole, broken = case.folder / 'whole.pth', case.folder / 'broken.pth'
    torch.save(dict(state_dict=case.model.state_dict()), whole)
    cut(whole, broken, case.rng.choice((0.0, 0.1, 0.5, 0.9, 0.99)))
    executed = case.folder / 'executed'
    evil = dict(state_dict=case.model.state_dict(), meta=dict(hook=Payload(executed)))
    zipped = case.rng.random() < 0.5
    torch.save(evil, whole, _use_new_zipfile_serialization=zipped)
    for path, error in ((broken, ValueError), (whole, UnsafeCheckpointError)):
        try:
            verify_checkpoint(str(path))
        except error as raised:
            require(str(path) in str(raised), f'the message does not name the file: {raised}')
        else:
            raise Violation(f'{path.name} was loaded')
    require(not executed.exists(), 'code of a checkpoint was run')


FAULTS: dict[str, Callable[[Case], None]] = {
    'image of nan': bad_image(NAN),
    'one nan in an image': bad_image('pixel'),
    'image of inf': bad_image(INF),
    'constant image': bad_image(1.0),
    'image of zeros': bad_image(0.0),
    'huge image': bad_image('huge'),
    'weights x 100': large_weights,
    'constant f': constant_f,
    'memory > D, no fixed point': small_problems,
    'one evaluation': one_evaluation,
    'f raises in forward': interrupted(Broken, in_backward=False),
    'f raises in backward': interrupted(Broken, in_backward=True),
    'Ctrl-C in forward': interrupted(KeyboardInterrupt, in_backward=False),
    'Ctrl-C in backward': interrupted(KeyboardInterrupt, in_backward=True),
    'Ctrl-C before the step': interrupted_optimizer,
    'invalid option': invalid_option,
    'damaged file': damaged_file,
}
#: These change weights by themselves, the others must not.
CHANGES_WEIGHTS = ('weights x 100', 'constant f', 'one evaluation')


def inject(case: Case, name: str) -> None:
    """A fault after which the model continues to train as if nothing had happened.

    Weights are what they were, and the next training step has, bit for bit, the loss and the
    gradients that it has on a copy that never saw the fault.
    """
    seed = case.rng.getrandbits(32)
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    wanted = case.gradients(seed, copy.deepcopy(case.model))
    FAULTS[name](case)
    if name not in CHANGES_WEIGHTS:
        got = [p.detach() for p in case.model.parameters()]
        require_equal(got, [before[k] for k, _ in case.model.named_parameters()], 'weights')
    # What an interrupted forward did to the statistics of batch norms is undone with the step.
    case.model.load_state_dict(before)
    case.optimizer.zero_grad()
    require_equal(case.gradients(seed), wanted, 'the step after the fault')
