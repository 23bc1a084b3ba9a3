"""Pure-Python configs, as mmengine's ``read_base`` makes them: types are classes, not names.

They have no default scope, since classes need none.
"""

from pathlib import Path

RUNTIME = """
from mmengine.hooks import (
    CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
)
from mmengine.runner import LogProcessor, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend

from mdeq_mm.hooks import MDEQWarmupHook, SolverStatsHook

default_scope = None
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, interval=1),
    sampler_seed=dict(type=DistSamplerSeedHook),
    warmup=dict(type=MDEQWarmupHook),
    solver_stats=dict(type=SolverStatsHook),
)
log_processor = dict(type=LogProcessor)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
load_from = None
resume = False
"""
HEADER = """
from mmengine.config import read_base

with read_base():
    from .runtime import *

from mmcv.transforms import LoadImageFromFile, RandomFlip, TestTimeAug
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.optim import OptimWrapper, PolyLR
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.nn import BatchNorm2d, GroupNorm, SyncBatchNorm
from torch.optim import SGD

from mdeq_mm.deq import FixedPointIteration, ImplicitGradient
from mdeq_mm.models import MDEQBackbone

solver = dict(type=FixedPointIteration, max_iter=3, tol=1e-3)
backbone = dict(
    type=MDEQBackbone,
    channels=(8, 8),
    expansion=1,
    norm_cfg=dict(type=GroupNorm, num_groups=4),
    stem_norm_cfg=dict(type=SyncBatchNorm),
    solver=solver,
    gradient=dict(type=ImplicitGradient, solver=solver),
)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01))
"""
SEGMENTATION = """
from mmseg.datasets import CityscapesDataset
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs, RandomCrop, Resize
from mmseg.engine.hooks import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.models import (
    CrossEntropyLoss, EncoderDecoder, FCNHead, SegDataPreProcessor, SegTTAModel
)
from mmseg.visualization import SegLocalVisualizer

crop_size = (32, 64)
data_root = '{data_root}'
data_preprocessor = dict(
    type=SegDataPreProcessor, size=crop_size, mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True,
    pad_val=0, seg_pad_val=255,
)
model = dict(
    type=EncoderDecoder,
    data_preprocessor=data_preprocessor,
    backbone=backbone,
    decode_head=dict(
        type=FCNHead,
        in_channels=(8, 8),
        in_index=(0, 1),
        input_transform='resize_concat',
        channels=16,
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        num_classes=19,
        norm_cfg=dict(type=SyncBatchNorm),
        loss_decode=dict(type=CrossEntropyLoss),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
train_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations),
    dict(type=RandomCrop, crop_size=crop_size),
    dict(type=PackSegInputs),
]
test_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations),
    dict(type=PackSegInputs),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type=InfiniteSampler, shuffle=True),
    dataset=dict(
        type=CityscapesDataset,
        data_root=data_root,
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CityscapesDataset,
        data_root=data_root,
        data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=IoUMetric, iou_metrics=['mIoU'])
test_evaluator = val_evaluator
param_scheduler = [dict(type=PolyLR, power=0.9, begin=0, end=4, by_epoch=False)]
train_cfg = dict(type=IterBasedTrainLoop, max_iters=1, val_interval=1)
default_hooks.update(visualization=dict(type=SegVisualizationHook))
default_hooks.update(checkpoint=dict(type=CheckpointHook, interval=1, by_epoch=False))
log_processor.update(by_epoch=False)
visualizer = dict(
    type=SegLocalVisualizer, vis_backends=[dict(type=LocalVisBackend)], name='visualizer'
)
tta_model = dict(type=SegTTAModel)
tta_pipeline = [
    dict(type=LoadImageFromFile),
    dict(
        type=TestTimeAug,
        transforms=[
            [dict(type=Resize, scale_factor=1.0, keep_ratio=True)],
            [dict(type=RandomFlip, prob=p, direction='horizontal') for p in (0.0, 1.0)],
            [dict(type=LoadAnnotations)],
            [dict(type=PackSegInputs)],
        ],
    ),
]
"""
CLASSIFICATION = """
from mmpretrain.datasets import CustomDataset, PackInputs
from mmpretrain.engine.hooks import VisualizationHook
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import (
    ClsDataPreprocessor, CrossEntropyLoss, GlobalAveragePooling, ImageClassifier, LinearClsHead
)
from mmpretrain.visualization import UniversalVisualizer

data_root = '{data_root}'
data_preprocessor = dict(
    type=ClsDataPreprocessor, mean=[76.5] * 3, std=[89.25] * 3, num_classes=10
)
model = dict(
    type=ImageClassifier,
    backbone=backbone,
    neck=dict(type=GlobalAveragePooling),
    head=dict(
        type=LinearClsHead,
        num_classes=10,
        in_channels=8,
        loss=dict(type=CrossEntropyLoss),
        topk=(1,),
    ),
)
train_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(
        type=CustomDataset,
        data_root=data_root,
        data_prefix='train',
        pipeline=[dict(type=LoadImageFromFile), dict(type=PackInputs)],
    ),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CustomDataset,
        data_root=data_root,
        data_prefix='test',
        pipeline=[dict(type=LoadImageFromFile), dict(type=PackInputs)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=Accuracy, topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1, val_interval=1)
auto_scale_lr = dict(enable=False, base_batch_size=10)
default_hooks.update(visualization=dict(type=VisualizationHook, enable=False))
visualizer = dict(type=UniversalVisualizer, vis_backends=[dict(type=LocalVisBackend)])
"""


def write_configs(folder: Path, cityscapes: Path, digits: Path) -> None:
    """Write ``seg.py`` and ``cls.py``, and what both read."""
    (folder / 'runtime.py').write_text(RUNTIME)
    for name, text, data in (
        ('seg.py', SEGMENTATION, cityscapes),
        ('cls.py', CLASSIFICATION, digits),
    ):
        (folder / name).write_text(HEADER + text.replace('{data_root}', str(data)))
