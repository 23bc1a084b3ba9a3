"""What users do with a model."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from torch import Tensor

from mdeq_mm.compat import verify_checkpoint
from mdeq_mm.deq.solvers import Solver
from mdeq_mm.registry import build_part

from ..test_robustness.test_framework import loss_of
from .case import (
    NUM_CLASSES,
    Case,
    check_stats,
    draw_solver,
    is_finite,
    require,
    require_equal,
)


def train(case: Case) -> None:
    """Some optimizer steps, with or without clipping and accumulation."""
    rng = case.rng
    counts = rng.choice((1, 1, 2))
    clip = rng.choice((None, dict(max_norm=1.0), dict(type='value', clip_value=0.1)))
    wrapper = OptimWrapper(case.optimizer, accumulative_counts=counts, clip_grad=clip)
    before = [p.detach().clone() for p in case.model.parameters()]
    skipped = []

    def check(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group['params']]
        if not is_finite(grads):
            half = case.precision == 'fp16 autocast'
            require(half, 'a gradient of finite images is not finite')
            # It overflows in float16: the step is skipped, as a loss scaler would.
            optimizer.zero_grad()
            skipped.append(True)

    handle = case.optimizer.register_step_pre_hook(check)
    try:
        case.model.train()
        for _ in range(counts * rng.randint(1, 2)):
            loss = case.loss()
            require(torch.isfinite(loss), f'loss {loss.item()}')
            wrapper.update_params(loss)
            backward = case.backbone.implicit.backward_stats
            if backward is not None:
                check_stats(backward, case.backbone.implicit.gradient.solver)
    finally:
        handle.remove()
    moved = any(not torch.equal(p, b) for p, b in zip(case.model.parameters(), before))
    require(moved or skipped, 'a training step left all weights as they were')


def evaluate(case: Case) -> None:
    """Whole or slide inference through MM's own predict."""
    case.model.eval()
    with torch.no_grad(), case.autocast():
        predictions = case.model(case.images, case.samples(), mode='predict')
    require(len(predictions) == len(case.images), 'another number of predictions')
    for sample in predictions:
        if case.task != 'segmentor':
            score = sample.pred_score
            require(is_finite([score]) and len(score) == NUM_CLASSES, f'scores {score}')
        if case.task != 'classifier':
            labels = sample.pred_sem_seg.data
            require(labels.shape == (1, *case.size), f'map of {tuple(labels.shape)}')
            require(0 <= labels.min() and labels.max() < NUM_CLASSES, 'labels out of range')


def copies(case: Case) -> None:
    """A deep copy and a moving average predict like the model and own their weights."""
    wanted = case.features()
    twin = copy.deepcopy(case.model)
    average = ExponentialMovingAverage(case.model, momentum=0.3)
    average.update_parameters(case.model)
    for other in (twin, average.module):
        require_equal(case.features(backbone=other.backbone), wanted, 'a copy predicts otherwise')
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    require_equal(case.features(), wanted, 'a copy shares weights')
    require_equal(case.features(backbone=average.module.backbone), wanted, 'an average shares')


def through_a_file(case: Case) -> None:
    """Weights saved and loaded into a new model; the whole backbone where torch pickles it."""
    path = case.folder / 'weights.pth'
    torch.save(dict(state_dict=case.model.state_dict()), path)
    other = case.build()
    other.load_state_dict(verify_checkpoint(str(path))['state_dict'])
    layer, other_layer = case.backbone.implicit, other.backbone.implicit
    # Options live in the config, not in the weights.
    other_layer.solver, other_layer.gradient = layer.solver, layer.gradient
    other_layer.unrolled_layers = layer.unrolled_layers
    other.backbone.cell.smooth = case.backbone.cell.smooth
    wanted = case.features()
    require_equal(case.features(backbone=other.backbone), wanted, 'loaded weights')
    if not case.config['backbone']['weight_norm']:
        torch.save(case.backbone, path)
        again = torch.load(path, weights_only=False)
        require_equal(case.features(backbone=again), wanted, 'a pickled backbone')


def warm_up(case: Case) -> None:
    """Switch between unrolled and implicit, as MDEQWarmupHook does, and take a step."""
    layer = case.backbone.implicit
    layer.unrolled_layers = 0 if layer.unrolled_layers else case.rng.randint(1, 4)
    case.backbone.cell.smooth = case.rng.random() < 0.5
    train(case)
    case.check()
    layer.unrolled_layers, case.backbone.cell.smooth = case.unrolled, False


def freeze(case: Case) -> None:
    """Frozen stages keep weights and statistics through training."""
    backbone, stages = case.backbone, case.rng.randint(0, 2)
    parts = (backbone.stem, backbone.injection, backbone.cell)[: stages + 1]
    backbone.frozen_stages = stages
    case.model.train()
    before = [v.clone() for part in parts for v in part.state_dict().values()]
    train(case)
    after = [v for part in parts for v in part.state_dict().values()]
    require_equal(after, before, 'a frozen stage changed')
    backbone.frozen_stages = -1
    backbone.requires_grad_(True)


def two_live_forwards(case: Case) -> None:
    """Gradients of two forwards, run backward in reverse order, are those of each alone."""
    images = (case.images, torch.randn_like(case.images))
    parameters = list(case.backbone.parameters())
    case.backbone.train()

    def forward(index: int) -> Tensor:
        torch.manual_seed(index)
        with case.autocast():
            return loss_of([out.to(torch.float32) for out in case.backbone(images[index])])

    def backward(loss: Tensor) -> tuple:
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    wanted = [backward(forward(index)) for index in (0, 1)]
    losses = [forward(index) for index in (0, 1)]
    for index in (1, 0):
        require_equal(backward(losses[index]), wanted[index], f'gradients of forward {index}')


def threads(case: Case) -> None:
    """Threads that predict at the same time with one model get what each gets alone."""
    images = [torch.randn_like(case.images) for _ in range(4)]
    wanted = [case.features(x) for x in images]
    with ThreadPoolExecutor(3) as pool:
        for got, expected in zip(pool.map(case.features, images), wanted):
            require_equal(got, expected, 'a prediction in a thread')


def other_resolution(case: Case) -> None:
    """Another batch and image size from here on."""
    case.new_batch()


def other_solver(case: Case) -> None:
    """Another number of evaluations or another solver, set on the live model."""
    layer = case.backbone.implicit
    before = layer.solver, layer.eval_solver, layer.unrolled_layers
    cfg = draw_solver(case.rng, max_iter=20)
    layer.eval_solver, layer.unrolled_layers = None, 0
    if layer.gradient.needs_state and cfg['type'] == 'FixedPointIteration':
        layer.solver = layer.solver.replace(max_iter=cfg['max_iter'])
    else:
        layer.solver = build_part(cfg, Solver)
    case.check()
    evaluate(case)
    layer.solver, layer.eval_solver, layer.unrolled_layers = before


def input_gradient(case: Case) -> None:
    """The gradient with respect to the images in evaluation, for attacks and saliency."""
    case.backbone.eval()
    images = case.images.clone().requires_grad_()
    with case.autocast():
        outs = case.backbone(images)
    (grad,) = torch.autograd.grad(loss_of([out.to(torch.float32) for out in outs]), images)
    # In float16 it may overflow, as in training, where a loss scaler sees it.
    half = case.precision == 'fp16 autocast'
    require(grad.shape == images.shape and (is_finite([grad]) or half), 'gradient to the images')
    require(all(p.grad is None for p in case.model.parameters()), 'weights got a gradient')


def one_by_one(case: Case) -> None:
    """A batch gives the same as its images one by one."""
    parts = [[index] for index in range(len(case.images))]
    compare_in_double(case, case.images, parts)


def compare_in_double(case: Case, images: Tensor, parts: list[list[int]]) -> None:
    """In double precision at tol 0, parts of a batch get what they get as batches of their own.

    To 1e-9, or a thousand times what noise of 1e-14 in the images does. Kernels round otherwise
    for another batch size, and an untrained f can make anything of that: it divides groups of
    values that are equal but for rounding by their spread. Where it does, fewer evaluations are
    compared.

    Args:
        case: Whose backbone.
        images: The batch; what is in no part may be bad.
        parts: Indices of each.
    """
    net = copy.deepcopy(case.backbone).double().eval()
    net.implicit.solver = net.implicit.solver.replace(tol=0.0)
    net.implicit.eval_solver = None
    images, kept = images.double(), sorted(sum(parts, []))
    noisy = images * (1 + 1e-14 * torch.randn_like(images))
    with torch.no_grad():
        for budget in (net.implicit.solver.max_iter, 3, 1):
            budget = min(budget, net.implicit.solver.max_iter)
            net.implicit.solver = net.implicit.solver.replace(max_iter=budget)
            together = [out[kept] for out in net(images)]
            effect = max((o - n[kept]).abs().max() for o, n in zip(together, net(noisy))).item()
            if effect < 1e-10:
                break
            net.implicit.unrolled_layers = min(net.implicit.unrolled_layers, 1)
        tolerance = 1e-9 + 1e3 * effect
        for part in parts:
            rows = [kept.index(index) for index in part]
            for out, alone in zip(together, net(images[part])):
                gap = (out[rows] - alone).abs().max().item()
                require(gap <= tolerance, f'images {part} differ by {gap:.3g} in their batch')


ACTIONS: dict[str, Callable[[Case], None]] = {
    'train': train,
    'evaluate': evaluate,
    'copy and average': copies,
    'through a file': through_a_file,
    'warm-up switch': warm_up,
    'freeze and thaw': freeze,
    'two live forwards': two_live_forwards,
    'threads predict': threads,
    'other resolution': other_resolution,
    'other solver': other_solver,
    'gradient to input': input_gradient,
    'batch = one by one': one_by_one,
}
