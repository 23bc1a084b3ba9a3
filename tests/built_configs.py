"""The objects that MM's Runner builds from a config, described by plain values.

No data set is needed: data sets hold one generated image, and parameters have no storage.
"""

import copy
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.visualization import Visualizer
from mmseg.models import SegDataPreProcessor
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mdeq_mm.layers import VariationalDropout2d
from mdeq_mm.models import MDEQBackbone, MDEQFuseNeck
from mdeq_mm.models.cell import Upsample

# Rows and columns of each data set's image; those of Cityscapes are a quarter of the real ones.
IMAGE_SIZES = {
    'data/camvid': (360, 480),
    'data/cifar10': (32, 32),
    'data/cifar10_images': (32, 32),
    'data/cityscapes/': (256, 512),
    'data/coco/': (480, 640),
    'data/digit_scenes': (64, 64),
    'data/digits': (16, 16),
    'data/imagenet': (375, 500),
}
# Batches per epoch here, whatever the data set: schedules over epochs that step every iteration
# are built with this number.
EPOCH = 4

_LOSS = ('use_sigmoid', 'loss_weight', 'class_weight')
_QUASI_NEWTON = ('max_iter', 'tol', 'memory')
_FCN_HEAD = (
    'in_channels',
    'in_index',
    'input_transform',
    'channels',
    'num_convs',
    'kernel_size',
    'concat_input',
    'dropout_ratio',
    'num_classes',
    'align_corners',
    'loss_decode',
)
# Attributes that describe an object, by the name of its class.
_TOLD = {
    # Solvers, gradients, penalties.
    'Anderson': (*_QUASI_NEWTON, 'damping'),
    'FixedPointIteration': ('max_iter', 'tol', 'damping'),
    'ImplicitGradient': ('solver',),
    'JacobianFreeGradient': (),
    'JacobianRegularizer': ('weight', 'probability', 'samples'),
    'LimitedMemoryBroyden': _QUASI_NEWTON,
    'PhantomGradient': ('steps', 'damping'),
    # Necks, heads and losses.
    'ClsHead': ('loss_module', 'topk'),
    'CrossEntropyLoss': _LOSS,
    'FCNHead': _FCN_HEAD,
    'FPN': ('in_channels', 'out_channels', 'num_outs', 'add_extra_convs'),
    'GlobalAveragePooling': (),
    'L1Loss': ('loss_weight',),
    'LinearClsHead': ('in_channels', 'num_classes', 'loss_module', 'topk'),
    'Identity': (),
    'LinearNeck': ('in_channels', 'out_channels', 'norm_cfg', 'act_cfg', 'gap'),
    'MultiLabelLinearClsHead': ('in_channels', 'num_classes', 'loss_module', 'thr', 'topk'),
    # Optimization.
    'CosineAnnealingLR': ('begin', 'end', 'T_max', 'eta_min', 'by_epoch', 'param_name'),
    'LinearLR': ('begin', 'end', 'start_factor', 'end_factor', 'by_epoch', 'param_name'),
    'MultiStepLR': ('begin', 'end', 'milestones', 'gamma', 'by_epoch', 'param_name'),
    'PolyLR': ('begin', 'end', 'power', 'eta_min', 'by_epoch', 'param_name'),
    # Data.
    'CenterCrop': ('crop_size',),
    'LoadAnnotations': ('with_seg', 'with_bbox', 'reduce_zero_label'),
    'LoadImageFromFile': ('color_type', 'to_float32'),
    'PackDetInputs': ('meta_keys',),
    'PackInputs': ('input_key',),
    'PackSegInputs': (),
    'PhotoMetricDistortion': (
        'brightness_delta',
        'contrast_lower',
        'contrast_upper',
        'saturation_lower',
        'saturation_upper',
        'hue_delta',
    ),
    'PresentClasses': ('num_classes',),
    # mmsegmentation's or mmpretrain's.
    'RandomCrop': ('crop_size', 'cat_max_ratio', 'padding', 'padding_mode', 'pad_if_needed'),
    'RandomFlip': ('prob', 'direction'),
    'RandomResize': ('scale', 'ratio_range', 'resize.keep_ratio', 'resize.interpolation'),
    'RandomResizedCrop': ('scale', 'crop_ratio_range', 'aspect_ratio_range', 'interpolation'),
    'Resize': ('scale', 'scale_factor', 'keep_ratio', 'interpolation'),
    'ResizeEdge': ('edge', 'scale', 'interpolation'),
    # Evaluation.
    'Accuracy': ('topk', 'thrs'),
    'AveragePrecision': ('average',),
    'CocoMetric': ('metrics', 'proposal_nums', 'format_only', 'classwise'),
    'IoUMetric': ('metrics', 'ignore_index'),
    'MultiLabelMetric': ('thr', 'topk', 'average', 'items'),
    # Hooks.
    'DetVisualizationHook': ('draw', 'interval'),
    'DistSamplerSeedHook': (),
    'IterTimerHook': (),
    'IterationSeedHook': (),
    'LoggerHook': ('interval', 'log_metric_by_epoch', 'ignore_last'),
    'MDEQCheckpointHook': ('interval', 'by_epoch', 'save_best', 'max_keep_ckpts', 'save_last'),
    'MDEQRegularizerHook': ('weight_step', 'step_interval', 'begin_iter', 'end_iter'),
    'MDEQWarmupHook': ('unrolled_iters', 'unrolled_layers', 'softplus_iters'),
    'NonFiniteGradientHook': ('max_in_a_row',),
    'ParamSchedulerHook': (),
    'RuntimeInfoHook': (),
    'SegVisualizationHook': ('draw', 'interval'),
    'SolverStatsHook': ('interval', 'warn_residual', 'patience'),
    'VisualizationHook': ('enable', 'interval'),
}
_RECIPE_HOOKS = ('MDEQWarmupHook', 'MDEQRegularizerHook')
# Keys of an optimizer's parameter groups that our configs do not set.
_OF_TORCH = (
    'params',
    'initial_lr',
    'foreach',
    'fused',
    'capturable',
    'differentiable',
    'decoupled_weight_decay',
)
_OF_DATASETS = (
    'data_root',
    'split',
    'data_prefix',
    'ann_file',
    'img_suffix',
    'seg_map_suffix',
    'test_mode',
    'filter_cfg',
)


def tell(part: Any) -> dict[str, Any]:
    """Name of an object's class, and what ``_TOLD`` lists for it.

    Raises:
        KeyError: If ``_TOLD`` has no entry for the class.
    """
    told = dict(type=type(part).__name__)
    for name in _TOLD[told['type']]:
        try:
            told[name.strip('_')] = plain(attrgetter(name)(part))
        except AttributeError:
            # Attributes that a class of the same name in another project lacks.
            continue
    return told


def plain(value: Any) -> Any:
    """A value of numbers, strings, lists and dicts alone."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return tell(value)


class _NoStorage(TorchFunctionMode):
    """Parameters on the meta device. Unlike with that as the default, tensors keep values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **(dict(kwargs, device='meta') if func is torch.empty else kwargs))


class ConfigRunner(Runner):
    """A Runner that builds everything training starts with, without data."""

    image: Path

    def build_model(self, model: dict) -> nn.Module:
        with _NoStorage():
            return super().build_model(model)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        # The model stays where it is, and SyncBN stays SyncBN, as on several GPUs.
        return model

    def build_visualizer(self, visualizer: dict) -> Any:
        # One of a name lives as long as the process, whatever is asked for later.
        self.visualizer_name = visualizer.get('name')
        return super().build_visualizer(dict(visualizer, name=self.experiment_name))

    def build_logger(self, log_level: str = 'INFO', **options: Any) -> Any:
        # A failing test should show what differs, not the order of all hooks.
        return super().build_logger(log_level='ERROR', **options)

    def build_evaluator(self, evaluator: Any) -> Any:
        # COCO's metric reads the boxes of the whole set when it is made.
        if isinstance(evaluator, dict) and 'ann_file' in evaluator:
            self.annotations = [*getattr(self, 'annotations', []), evaluator['ann_file']]
            path = self.image.with_suffix('.json')
            path.write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
            evaluator = dict(evaluator, ann_file=str(path))
        return super().build_evaluator(evaluator)

    def dump_config(self) -> None:
        """Nobody reads the file or the output of ``_log_env``."""

    def _log_env(self, env_cfg: dict) -> None:
        pass

    @classmethod
    def build_dataloader(cls, dataloader: dict, seed: int | None = None, **options: Any) -> Any:
        cfg = dict(dataloader['dataset'], lazy_init=True, serialize_data=False)
        dataset = DATASETS.build(cfg)
        dataset.data_list = [sample(cls.image)] * (EPOCH * dataloader['batch_size'])
        dataset._fully_initialized = True
        return super().build_dataloader(dict(dataloader, dataset=dataset), seed, **options)


def sample(image: Path) -> dict[str, Any]:
    """One entry of any of the data sets: an image and a map of labels of its size."""
    return dict(
        img_path=str(image),
        # As the arrays of CIFAR-10 are, in RGB.
        img=cv2.imread(str(image))[..., ::-1],
        gt_label=0,
        seg_map_path=str(image.with_suffix('.labels.png')),
        label_map=None,
        reduce_zero_label=False,
        seg_fields=[],
        img_id=0,
        instances=[],
        sample_idx=0,
    )


def write_image(path: Path, image: np.ndarray) -> Path:
    """Write an image (H, W, 3) in RGB, and beside it a map of labels 0."""
    cv2.imwrite(str(path), image[..., ::-1])
    cv2.imwrite(str(path.with_suffix('.labels.png')), np.zeros(image.shape[:2], np.uint8))
    return path


def measure(cfg: Config, folder: Path) -> dict[str, dict[str, Any]]:
    """Build the Runner of a config and describe its parts.

    Args:
        cfg: The config.
        folder: For generated images and what a Runner writes.

    Returns:
        dict: Values by section and name.
    """
    if cfg.default_scope != 'mmengine':
        importlib.import_module(cfg.default_scope)
    rows, columns = IMAGE_SIZES[cfg.train_dataloader.dataset.data_root]
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    ConfigRunner.image = write_image(folder / f'{rows}x{columns}.png', image)
    cfg.work_dir = str(folder)
    with built(cfg) as runner:
        return dict(
            backbone=backbone_of(runner.model),
            heads=heads_of(runner),
            training=training_of(runner),
            data=data_of(runner, folder),
            evaluation=evaluation_of(runner),
            runtime=runtime_of(runner),
        )


@contextmanager
def built(cfg: Config) -> Iterator[ConfigRunner]:
    """Build a Runner in the scope of its config, and leave no global state behind."""
    managers = (MMLogger, MessageHub, DefaultScope, Visualizer)
    before = [(manager, manager._instance_dict.copy()) for manager in managers]
    cudnn_benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        runner = ConfigRunner.from_cfg(cfg)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            yield runner
    finally:
        torch.backends.cudnn.benchmark = cudnn_benchmark
        for manager, instances in before:
            for name in manager._instance_dict.keys() - instances.keys():
                instance = manager._instance_dict.pop(name)
                for handler in getattr(instance, 'handlers', ()):
                    handler.close()


class BackboneAlone(nn.Module):
    """A model without the heads of its project."""

    def __init__(self, backbone: dict) -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)


def measure_core(cfg: Config, folder: Path) -> dict[str, Any]:
    """``measure`` without the parts that need the config's own project, which may be missing.

    Returns:
        dict: The sections backbone and training, and the hooks.
    """
    ConfigRunner.image = write_image(folder / 'image.png', np.zeros((8, 8, 3), np.uint8))
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(folder)
    cfg.default_scope = 'mmengine'
    cfg.model = dict(type=BackboneAlone, backbone=cfg.model.backbone)
    cfg.visualizer = dict(type='Visualizer')
    cfg.default_hooks.pop('visualization')
    cfg.train_dataloader.pop('batch_sampler', None)
    cfg.train_dataloader.dataset = dict(type=BaseDataset)
    for name in ('val', 'test'):
        cfg[f'{name}_dataloader'] = cfg[f'{name}_cfg'] = cfg[f'{name}_evaluator'] = None
    with built(cfg) as runner:
        return dict(
            backbone=backbone_of(runner.model),
            training=training_of(runner),
            hooks=[_hook(hook) for hook in runner.hooks],
        )


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _distinct(values: Any) -> list:
    return sorted(set(values), key=str)


def _norms(module: nn.Module) -> list[list]:
    """Kinds of the batch norms of a module, with momentum."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    return [list(pair) for pair in _distinct((type(m).__name__, m.momentum) for m in norms)]


def backbone_of(model: nn.Module) -> dict[str, Any]:
    backbone = model.backbone
    told = dict(
        type=type(backbone).__name__,
        parameters=parameters(backbone),
        frozen=sum(not p.requires_grad for p in backbone.parameters()),
        batch_norms=_norms(backbone),
        init_cfg=plain(backbone.init_cfg),
    )
    if isinstance(backbone, MDEQBackbone):
        told.update(_mdeq(backbone))
    elif told['type'] == 'HRNet':
        stages = [getattr(backbone, f'stage{i}_cfg') for i in (1, 2, 3, 4)]
        told.update(
            {
                key: [plain(stage[key]) for stage in stages]
                for key in ('block', 'num_modules', 'num_branches', 'num_blocks', 'num_channels')
            }
        )
    elif told['type'] == 'ResNet_CIFAR':
        names = ('depth', 'base_channels', 'stem_channels', 'strides')
        told.update({name: plain(getattr(backbone, name)) for name in names})
    else:
        told.update(
            hidden_channels=backbone.function.conv1.out_channels,
            augment_channels=backbone.augment_channels,
            steps=backbone.steps,
            tol=backbone.tol,
        )
    return told


def _mdeq(backbone: MDEQBackbone) -> dict[str, Any]:
    cell, implicit = backbone.cell, backbone.implicit
    block = cell.blocks[0]
    modules = list(cell.modules())
    return dict(
        channels=list(backbone.channels),
        expansion=block.conv1.out_channels // block.conv1.in_channels,
        stem_strides=[conv.conv.stride[0] for conv in backbone.stem],
        has_injection=not isinstance(backbone.injection, nn.Identity),
        groups=_distinct(m.num_groups for m in modules if isinstance(m, nn.GroupNorm)),
        affine=_distinct(m.affine for m in modules if isinstance(m, nn.GroupNorm)),
        norm_kernel=_distinct(m.kernel for m in modules if isinstance(m, nn.GroupNorm)),
        weight_norm=any(name.endswith('original0') for name in cell.state_dict()),
        upsample=_distinct(m.mode for m in modules if isinstance(m, Upsample)),
        drop_rate=_distinct(m.drop_rate for m in modules if isinstance(m, VariationalDropout2d)),
        solver=tell(implicit.solver),
        jitter=plain(getattr(implicit.solver, 'jitter', None)),
        gradient=tell(implicit.gradient),
        start=type(implicit.start).__name__,
        regularizer=plain(implicit.regularizer),
        unrolled_layers=implicit.unrolled_layers,
        eval_solver=plain(implicit.eval_solver),
        skip_solved=implicit.skip_solved,
        out_indices=list(backbone.out_indices),
        norm_eval=backbone.norm_eval,
    )


def _neck(neck: nn.Module) -> Any:
    if isinstance(neck, MDEQFuseNeck):
        bottlenecks = list(neck.bottlenecks)
        return dict(
            type='MDEQFuseNeck',
            in_channels=[b.conv1.conv.in_channels for b in bottlenecks],
            head_channels=[b.conv1.conv.out_channels for b in bottlenecks],
            out_channels=neck.final[0].out_channels,
            batch_norms=_norms(neck),
            init_cfg=plain(neck.init_cfg),
        )
    children = list(neck.children())
    if type(neck) is nn.Sequential or any(isinstance(c, MDEQFuseNeck) for c in children):
        return [_neck(child) for child in children]
    return tell(neck)


def heads_of(runner: Runner) -> dict[str, Any]:
    model = runner.model
    told = dict(
        model=type(model).__name__,
        parameters=parameters(model),
        batch_norms=_norms(model),
        test_cfg=plain(model.test_cfg) if getattr(model, 'test_cfg', None) else None,
        train_cfg=plain(model.train_cfg) if getattr(model, 'train_cfg', None) else None,
        # Tools that build the model alone, as mmsegmentation's init_model, read it there.
        preprocessor=(runner.cfg.model.get('data_preprocessor') or {}).get('type'),
        neck=_neck(model.neck) if getattr(model, 'neck', None) is not None else None,
    )
    if hasattr(model, 'decode_head'):
        told['head'] = tell(model.decode_head)
        told['auxiliary_head'] = getattr(model, 'auxiliary_head', None) is not None
    elif hasattr(model, 'roi_head'):
        told.update(_detector(model))
    elif hasattr(model.head, 'seg_head'):
        told['head'] = dict(
            type=type(model.head).__name__,
            seg=tell(model.head.seg_head),
            cls_neck=_neck(model.head.cls_neck),
            cls=tell(model.head.cls_head),
        )
    else:
        told['head'] = tell(model.head)
    return told


def _detector(model: nn.Module) -> dict[str, Any]:
    """RPN and RoI head of Faster R-CNN."""
    rpn, box = model.rpn_head, model.roi_head.bbox_head
    extractor = model.roi_head.bbox_roi_extractor
    anchors = rpn.anchor_generator
    return dict(
        rpn=dict(
            type=type(rpn).__name__,
            in_channels=rpn.in_channels,
            feat_channels=rpn.feat_channels,
            anchor_scales=plain(anchors.scales),
            anchor_ratios=plain(anchors.ratios),
            anchor_strides=plain(anchors.strides),
            coder_stds=plain(rpn.bbox_coder.stds),
            loss_cls=tell(rpn.loss_cls),
            loss_bbox=tell(rpn.loss_bbox),
        ),
        roi=dict(
            type=type(model.roi_head).__name__,
            extractor=type(extractor).__name__,
            out_channels=extractor.out_channels,
            strides=plain(extractor.featmap_strides),
            layer=type(extractor.roi_layers[0]).__name__,
            output_size=plain(extractor.roi_layers[0].output_size),
            sampling_ratio=extractor.roi_layers[0].sampling_ratio,
        ),
        box=dict(
            type=type(box).__name__,
            in_channels=box.in_channels,
            fc_out_channels=box.fc_out_channels,
            roi_feat_size=plain(box.roi_feat_size),
            num_classes=box.num_classes,
            coder_stds=plain(box.bbox_coder.stds),
            reg_class_agnostic=box.reg_class_agnostic,
            loss_cls=tell(box.loss_cls),
            loss_bbox=tell(box.loss_bbox),
        ),
    )


def training_of(runner: Runner) -> dict[str, Any]:
    loop = runner.train_loop
    runner.optim_wrapper = wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    # Before a schedule begins with another rate.
    groups = [dict(group) for group in wrapper.optimizer.param_groups]
    schedulers = runner.build_param_scheduler(runner.param_schedulers)
    by_iteration = isinstance(loop, IterBasedTrainLoop)
    warmup, penalty = [
        next((tell(hook) for hook in runner.hooks if type(hook).__name__ == kind), None)
        for kind in _RECIPE_HOOKS
    ]
    return dict(
        optimizer=dict(
            type=type(wrapper.optimizer).__name__,
            **{key: plain(value) for key, value in groups[0].items() if key not in _OF_TORCH},
        ),
        parameter_groups=len(groups),
        parameters_left_out=parameters(runner.model)
        - sum(p.numel() for group in groups for p in group['params']),
        wrapper=type(wrapper).__name__,
        accumulated_batches=wrapper._accumulative_counts,
        clip_grad=plain(wrapper.clip_grad_kwargs) or None,
        schedule=[tell(scheduler) for scheduler in schedulers],
        length=[loop.max_iters, 'iterations'] if by_iteration else [loop.max_epochs, 'epochs'],
        val_interval=loop.val_interval,
        batch_size=runner.train_dataloader.batch_sampler.batch_size,
        auto_scale_lr=plain(runner.auto_scale_lr),
        warmup=warmup,
        penalty_schedule=penalty,
        seed=runner._randomness_cfg.get('seed'),
        deterministic=runner._randomness_cfg.get('deterministic', False),
    )


def data_of(runner: Runner, folder: Path) -> dict[str, Any]:
    told = {}
    loaders = dict(
        train=runner.train_dataloader, val=runner.val_dataloader, test=runner.test_dataloader
    )
    for name, loader in loaders.items():
        told[f'{name}_dataset'] = _dataset(loader.dataset)
        told[f'{name}_pipeline'] = [tell(step) for step in loader.dataset.pipeline.transforms]
        told[f'{name}_loader'] = dict(
            num_workers=loader.num_workers,
            persistent_workers=loader.persistent_workers,
            drop_last=loader.batch_sampler.drop_last,
            sampler=type(loader.batch_sampler.sampler).__name__,
            shuffle=loader.batch_sampler.sampler.shuffle,
            batch_sampler=type(loader.batch_sampler).__name__,
            collate_fn=loader.collate_fn.func.__name__,
        )
    for name in ('val', 'test'):
        told[f'{name}_loader']['batch_size'] = loaders[name].batch_size
    told['train_input'] = list(_inputs(runner, runner.train_dataloader, True)[0].shape[1:])
    for name in ('val', 'test'):
        inputs, samples = _inputs(runner, loaders[name], False)
        told[f'{name}_input'] = list(inputs.shape[1:])
        if 'gt_sem_seg' in samples[0]:
            told[f'{name}_labels'] = list(samples[0].gt_sem_seg.shape)
    told['preprocessor'] = _preprocessor(runner, folder)
    return told


def _dataset(dataset: Any) -> dict[str, Any]:
    told = {key: plain(getattr(dataset, key)) for key in _OF_DATASETS if hasattr(dataset, key)}
    classes = dataset.metainfo.get('classes')
    if type(dataset).METAINFO.get('classes'):
        # Names and colours are those of the class.
        told['classes'] = len(classes)
    else:
        told['classes'] = plain(classes)
        told['palette'] = plain(dataset.metainfo.get('palette'))
    return dict(type=type(dataset).__name__, **told)


def _inputs(runner: Runner, loader: Any, training: bool) -> tuple[torch.Tensor, list]:
    """The input of the net for the first image of a loader, (1, 3, H, W), and its data sample."""
    batch = loader.collate_fn([loader.dataset[0]])
    data = runner.model.data_preprocessor(batch, training)
    return data['inputs'], data['data_samples']


def _preprocessor(runner: Runner, folder: Path) -> dict[str, Any]:
    """Order of the channels that enter the net, and the mean and std that normalize them.

    Found from what pure colours become: channel c is (x - mean) / std of one of R, G and B.
    """
    loader = runner.val_dataloader
    colours = dict(black=(0, 0, 0), R=(255, 0, 0), G=(0, 255, 0), B=(0, 0, 255))
    seen = {}
    for name, colour in colours.items():
        image = write_image(folder / f'{name}.png', np.full((32, 32, 3), colour, np.uint8))
        loader.dataset.data_list = [sample(image)]
        inputs, _ = _inputs(runner, loader, False)
        seen[name] = inputs[0, :, inputs.shape[2] // 2, inputs.shape[3] // 2].double()
    order, mean, std = '', [], []
    for channel in range(3):
        slopes = {name: float(seen[name][channel] - seen['black'][channel]) for name in 'RGB'}
        source = max(slopes, key=lambda name: abs(slopes[name]))
        order += source
        std.append(round(255 / slopes[source], 4))
        mean.append(round(-float(seen['black'][channel]) * 255 / slopes[source], 4))
    preprocessor = runner.model.data_preprocessor
    # Each pads by options of its own; what it only inherits it does not look at.
    names = ('pad_size_divisor', 'pad_value')
    if isinstance(preprocessor, SegDataPreProcessor):
        names = ('size', 'size_divisor', 'pad_val', 'seg_pad_val')
    padding = {name: plain(getattr(preprocessor, name)) for name in names}
    return dict(
        type=type(preprocessor).__name__,
        order=order,
        mean=mean,
        std=std,
        num_classes=getattr(preprocessor, 'num_classes', None),
        padding={name: value for name, value in padding.items() if value is not None},
    )


def evaluation_of(runner: Runner) -> dict[str, Any]:
    told = dict(
        val=[tell(metric) for metric in runner.val_loop.evaluator.metrics],
        test=[tell(metric) for metric in runner.test_loop.evaluator.metrics],
        loops=[type(loop).__name__ for loop in (runner.val_loop, runner.test_loop)],
        annotations=getattr(runner, 'annotations', []),
        tta_model=None,
    )
    tta_model = runner.cfg.get('tta_model')
    if tta_model is not None:
        with MODELS.switch_scope_and_registry(None) as registry:
            told['tta_model'] = registry.get(tta_model.type).__name__
        *first, views = Compose(runner.cfg.tta_pipeline).transforms
        told['tta_first'] = [tell(step) for step in first]
        told['tta_views'] = [[tell(s) for s in view.transforms] for view in views.subroutines]
    return told


def _hook(hook: Any) -> dict[str, Any]:
    # What belongs to the recipe is listed under training.
    kind = type(hook).__name__
    return dict(type=kind) if kind in _RECIPE_HOOKS else tell(hook)


def runtime_of(runner: Runner) -> dict[str, Any]:
    env = runner.cfg.env_cfg
    return dict(
        scope=runner.default_scope.scope_name,
        custom_imports=plain(runner.cfg.custom_imports),
        hooks=[_hook(hook) for hook in runner.hooks],
        custom_hooks=plain(runner.cfg.get('custom_hooks') or []),
        visualizer=dict(
            type=type(runner.visualizer).__name__,
            name=runner.visualizer_name,
            backends=[type(b).__name__ for b in runner.visualizer._vis_backends.values()],
        ),
        log_by_epoch=runner.log_processor.by_epoch,
        log_level=runner.cfg.log_level,
        load_from=runner._load_from,
        resume=runner._resume,
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        processes=[torch.multiprocessing.get_start_method(), cv2.getNumThreads()],
        backend=env.dist_cfg.backend,
    )
