"""A case: a random model with its batch, and the invariants that always hold."""

import contextlib
import copy
import random
from pathlib import Path
from typing import Any

import mmpretrain.models  # noqa: F401  # with all they bring, before live objects are counted
import mmseg.models  # noqa: F401
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mdeq_mm.deq.layer import SolverStats
from mdeq_mm.deq.solvers import Solver, Status
from mdeq_mm.layers import VariationalDropout2d
from mdeq_mm.models import MDEQBackbone

from ..test_robustness import SOLVERS
from ..test_robustness.test_shapes import halved, metas

NUM_CLASSES = 4
TASKS = ('classifier', 'segmentor', 'multitask')
PRECISIONS = ('float32', 'float32', 'float64', 'bf16 autocast', 'fp16 autocast')


class Violation(AssertionError):
    """An invariant does not hold."""


def require(holds: Any, what: str) -> None:
    """Raise a :class:`Violation` unless ``holds``; unlike assert, also under ``python -O``."""
    if not bool(holds):
        raise Violation(what)


def require_equal(got: Any, wanted: Any, what: str, rtol: float = 0) -> None:
    """Two lists of tensors are equal, nan included; bit for bit, unless ``rtol`` says otherwise."""
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        same = (a is None) == (b is None)
        same = same and (a is None or torch.allclose(a, b, rtol=rtol, atol=0, equal_nan=True))
        if not same:
            gap = 'one is None' if a is None or b is None else f'{(a - b).abs().max():.3g}'
            raise Violation(f'{what}: tensor {index} differs by {gap}')


def is_finite(tensors: Any) -> bool:
    """Whether all tensors are finite; None is skipped."""
    return all(torch.isfinite(t).all() for t in tensors if t is not None)


def draw_solver(rng: random.Random, kinds: tuple = SOLVERS, max_iter: int = 12) -> dict:
    """Config of a solver."""
    cfg = dict(type=rng.choice(kinds), max_iter=rng.randint(1, max_iter))
    cfg['tol'] = rng.choice((0.0, 1e-8, 1e-3, 1e-1))
    if cfg['type'] != 'LimitedMemoryBroyden':
        cfg['damping'] = rng.choice((1.0, 0.8, 0.3))
    if cfg['type'] != 'FixedPointIteration':
        cfg['memory'] = rng.choice((1, 2, 5, 20))
    if cfg['type'] == 'Anderson':
        cfg['ridge'] = rng.choice((0.0, 1e-6, 1e-3))
    return cfg


def draw_gradient(rng: random.Random, forward: str) -> dict:
    """Config of a gradient that fits the forward solver of that name."""
    choices = [
        dict(type='ImplicitGradient', solver=draw_solver(rng)),
        dict(type='TruncatedGradient', steps=rng.randint(1, 4)),
        dict(type='JacobianFreeGradient'),
        dict(type='PhantomGradient', steps=rng.randint(1, 3), damping=rng.choice((0.5, 1.0))),
    ]
    if forward != 'FixedPointIteration':
        choices.append(dict(type='SharedInverseGradient', steps=rng.randint(0, 3)))
    return rng.choice(choices)


def draw_backbone(rng: random.Random) -> dict:
    """Config of a backbone."""
    num_groups = rng.choice((1, 2, 4))
    norm = rng.choice((dict(type='GN'), dict(type='MDEQGroupNorm'), dict(type='GN', eps=1e-3)))
    stem_norm = rng.choice((dict(type='BN'), dict(type='BN', momentum=0.01)))
    solver = draw_solver(rng)
    return dict(
        type='MDEQBackbone',
        channels=tuple(num_groups * rng.randint(1, 3) for _ in range(rng.randint(1, 4))),
        expansion=rng.randint(1, 3),
        stem_strides=rng.choice(((1,), (2,), (1, 1), (2, 2), (2, 1, 2))),
        drop_rate=rng.choice((0.0, 0.1, 0.4)),
        weight_norm=rng.random() < 0.7,
        upsample=rng.choice(('nearest', 'bilinear')),
        norm_cfg=dict(norm, num_groups=num_groups),
        stem_norm_cfg=rng.choice((stem_norm, dict(type='GN', num_groups=num_groups))),
        solver=solver,
        gradient=draw_gradient(rng, solver['type']),
        unrolled_layers=rng.choice((0, 0, 0, 0, 3)),
        eval_solver=rng.choice((None, None, dict(max_iter=rng.randint(1, 16)))),
        skip_solved=rng.random() < 0.3,
        norm_eval=rng.random() < 0.3,
    )


def model_config(task: str, backbone: dict, rng: random.Random) -> dict:
    """A model of mmpretrain or mmseg around the backbone."""
    channels = backbone['channels']
    seg_head = dict(
        type='mmseg.FCNHead',
        in_channels=channels,
        in_index=tuple(range(len(channels))),
        input_transform='resize_concat',
        channels=4,
        kernel_size=rng.choice((1, 3)),
        num_convs=1,
        concat_input=False,
        dropout_ratio=rng.choice((0, 0.1)),
        num_classes=NUM_CLASSES,
        norm_cfg=dict(type='BN'),
        align_corners=rng.random() < 0.5,
    )
    if task == 'segmentor':
        crop = rng.randint(4, 16)
        stride = rng.randint(max(2, crop // 2), crop)
        window = dict(crop_size=(crop, crop), stride=(stride, stride))
        test_cfg = rng.choice((dict(mode='whole'), dict(mode='slide', **window)))
        return dict(
            type='mmseg.EncoderDecoder',
            data_preprocessor=dict(type='mmseg.SegDataPreProcessor', mean=None, std=None),
            backbone=backbone,
            decode_head=seg_head,
            # Read by attribute, as a Config gives it.
            test_cfg=ConfigDict(test_cfg),
        )
    preprocessor = dict(type='mmpretrain.ClsDataPreprocessor')
    neck = [
        dict(
            type='MDEQFuseNeck',
            in_channels=channels,
            head_channels=[2] * len(channels),
            out_channels=8,
        ),
        dict(type='mmpretrain.GlobalAveragePooling'),
    ]
    head = dict(type='mmpretrain.LinearClsHead', num_classes=NUM_CLASSES, in_channels=8, topk=(1,))
    if task == 'multitask':
        return dict(
            type='mmpretrain.ImageClassifier',
            data_preprocessor=preprocessor,
            backbone=backbone,
            head=dict(type='JointHead', seg=seg_head, cls_neck=neck, cls=head),
        )
    return dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=preprocessor,
        backbone=backbone,
        neck=neck,
        head=head,
    )


class Case:
    """One model, its optimizer and its present batch; everything follows from seed and index.

    Args:
        seed: The run's.
        index: The case's number in it.
        folder: Where it may write files.
    """

    def __init__(self, seed: int, index: int, folder: Path) -> None:
        # A string is hashed whole, and the same in every process.
        self.rng = rng = random.Random(f'{seed}/{index}')
        self.folder = folder
        torch.manual_seed(rng.getrandbits(32))
        self.task, self.precision = rng.choice(TASKS), rng.choice(PRECISIONS)
        self.config = model_config(self.task, draw_backbone(rng), rng)
        self.unrolled = self.config['backbone']['unrolled_layers']
        self.dtype = torch.float64 if self.precision == 'float64' else torch.float32
        self.model = self.build()
        if rng.random() < 0.5:
            self.model.init_weights()
        parameters = self.model.parameters()
        self.optimizer = (
            torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
            if rng.random() < 0.5
            else torch.optim.AdamW(parameters, lr=1e-3)
        )
        self.new_batch()

    def build(self) -> nn.Module:
        """Another model of the same config, with other weights."""
        return MODELS.build(copy.deepcopy(self.config)).to(self.dtype)

    def describe(self) -> str:
        """A description of the drawn case, in a few lines."""
        shape = tuple(self.images.shape)
        return f'{self.task}, {self.precision}, images {shape}\n{self.config["backbone"]}'

    @property
    def backbone(self) -> MDEQBackbone:
        return self.model.backbone

    def autocast(self) -> contextlib.AbstractContextManager:
        """The case's precision."""
        half = {'bf16 autocast': torch.bfloat16, 'fp16 autocast': torch.float16}
        dtype = half.get(self.precision)
        return torch.autocast('cpu', dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def new_batch(self) -> None:
        """Images of another number and size, odd ones too, and their labels.

        Two at least: batch norm in MM's heads has no statistics of one value.
        """
        n = self.rng.randint(2, 4)
        self.size = (self.rng.randint(3, 36), self.rng.randint(3, 36))
        self.images = torch.randn(n, 3, *self.size, dtype=self.dtype)
        self.labels = torch.randint(0, NUM_CLASSES, (n,))
        self.maps = torch.randint(0, NUM_CLASSES, (n, 1, *self.size))
        self.maps[:, :, 0, 0] = 255

    def samples(self) -> list:
        """Data samples of the batch, new ones at each call: predictions are written into them."""
        result = []
        for label, target, meta in zip(self.labels, self.maps, metas(len(self.images), *self.size)):
            if self.task == 'classifier':
                result.append(DataSample().set_gt_label(label))
            else:
                sample = SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=target))
                sample.set_data(dict(gt_label=label[None]))
                result.append(sample)
        return result

    def loss(self, model: nn.Module = None, images: Tensor = None) -> Tensor:
        """The batch's loss, as MM's train_step makes it."""
        model = self.model if model is None else model
        images = self.images if images is None else images
        with self.autocast():
            losses = model(images, self.samples(), mode='loss')
            return model.parse_losses(losses)[0]

    def features(self, images: Tensor = None, backbone: MDEQBackbone = None) -> tuple:
        """The backbone's maps in evaluation, without a graph."""
        backbone = self.backbone if backbone is None else backbone
        backbone.eval()
        with torch.no_grad(), self.autocast():
            return backbone(self.images if images is None else images)

    def gradients(self, seed: int, model: nn.Module = None) -> list:
        """Loss and gradients of a training step, without the step."""
        model = self.model if model is None else model
        model.train()
        torch.manual_seed(seed)
        loss = self.loss(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]

    def check(self) -> None:
        """Invariants that hold if weights and images are valid."""
        require(is_finite(self.model.state_dict().values()), 'weights or statistics not finite')
        outs = self.features()
        height, width = self.size
        first = [(stride - 1) for stride in self.backbone.stem_strides].count(1)
        for i, (out, channels) in enumerate(zip(outs, self.backbone.channels, strict=True)):
            scale = (halved(height, first + i), halved(width, first + i))
            wanted = (len(self.images), channels, *scale)
            require(out.shape == wanted, f'shape {tuple(out.shape)} for {wanted}')
            require(out.dtype == self.dtype, f'{out.dtype} out of a {self.dtype} backbone')
        layer = self.backbone.implicit
        require((layer.forward_stats is None) == (layer.unrolled_layers > 0), 'stats of no solve')
        check_stats(layer.forward_stats, layer.current_solver)
        require_finite_unless_reported(outs, layer.forward_stats)
        require(parametrize._cache_enabled == 0 and not parametrize._cache, 'cached weights left')

    def owned(self) -> list:
        """The tensors that a case may keep."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [self.images, self.labels, self.maps]
        for module in self.model.modules():
            if isinstance(module, VariationalDropout2d):
                tensors += module._masks.values()
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        stats = (self.backbone.implicit.forward_stats, self.backbone.implicit.backward_stats)
        for found in filter(None, stats):
            require(found.residual.grad_fn is None, 'stats hold a graph')
            tensors += vars(found).values()
        return tensors


def check_stats(stats: SolverStats | None, solver: Solver | Any) -> None:
    """Status, residual and number of evaluations are consistent."""
    if stats is None:
        return
    status, residual, num_iter = stats.status, stats.residual, stats.num_iter
    require(
        torch.equal(status == int(Status.CONVERGED), residual <= solver.tol),
        f'status {status.tolist()} at residual {residual.tolist()} and tol {solver.tol}',
    )
    reported = status == int(Status.NON_FINITE)
    require((torch.isfinite(residual) | reported).all(), 'a residual that is not finite')
    require(
        ((num_iter >= 1) & (num_iter <= solver.max_iter)).all(),
        f'{num_iter.tolist()} evaluations of {solver.max_iter}',
    )
    exhausted = status == int(Status.EXHAUSTED)
    require((num_iter[exhausted] == solver.max_iter).all(), 'exhausted before max_iter')


def require_finite_unless_reported(outs: tuple, stats: SolverStats | None) -> None:
    """Each image's maps are finite, or its status says that f gave nan or inf."""
    finite = torch.stack([torch.isfinite(out).flatten(1).all(dim=1) for out in outs]).all(dim=0)
    if stats is not None:
        finite = finite | (stats.status == int(Status.NON_FINITE))
    require(finite.all(), f'maps of images {(~finite).nonzero().flatten().tolist()} not finite')
