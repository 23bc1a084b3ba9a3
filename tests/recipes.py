"""What every config should be: the paper's recipes and ours, written down a second time.

The values are repeated here on purpose, from the paper, from what its authors released and from
publications since; ``test_configs.py`` compares them with what MM's Runner builds. Whoever changes
a recipe changes it in both places.

A row has the sections of ``built_configs.measure``.
"""

import math
from typing import Any

from .built_configs import EPOCH

Values = dict[str, Any]


def broyden(max_iter: int) -> Values:
    """Limited-memory Broyden, as all networks of the paper have it in both passes."""
    return dict(type='LimitedMemoryBroyden', max_iter=max_iter, tol=1e-3, memory=5)


def exact(max_iter: int) -> Values:
    """The gradient of the implicit function theorem."""
    return dict(type='ImplicitGradient', solver=broyden(max_iter))


def anderson(max_iter: int, memory: int) -> Values:
    return dict(type='Anderson', max_iter=max_iter, tol=1e-3, memory=memory, damping=1.0)


def phantom(steps: int, damping: float) -> Values:
    return dict(type='PhantomGradient', steps=steps, damping=damping)


def jacobian(weight: float, probability: float) -> Values:
    return dict(type='JacobianRegularizer', weight=weight, probability=probability, samples=1)


# --- The backbone -----------------------------------------------------------------------------

KAIMING = dict(type='Kaiming', layer='Conv2d')
OF_THE_RELEASED_CODE = [
    dict(type='Normal', layer='Conv2d', std=0.01),
    dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1),
]


def mdeq(
    parameters: int,
    channels: list[int],
    forward: int,
    gradient: Values,
    drop_rate: float = 0.0,
    expansion: int = 5,
    stem_strides: tuple[int, int] = (2, 2),
    batch_norm: tuple[str, float] = ('BatchNorm2d', 0.1),
    **changes: Any,
) -> Values:
    """An MDEQ of 8 groups, weight-normalized, upsampling to the nearest as released."""
    several = len(channels) > 1
    return dict(
        dict(
            type='MDEQBackbone',
            parameters=parameters,
            frozen=0,
            channels=channels,
            expansion=expansion,
            stem_strides=list(stem_strides),
            # None at full resolution with at most two scales, as released.
            has_injection=len(channels) > 2 or stem_strides != (1, 1),
            # The norm after the fusion has half of them.
            groups=[4, 8],
            affine=[True],
            norm_kernel=['auto'],
            batch_norms=[list(batch_norm)],
            weight_norm=True,
            upsample=['nearest'] if several else [],
            drop_rate=[drop_rate],
            solver=broyden(forward),
            jitter=None,
            gradient=gradient,
            start='ZeroStart',
            regularizer=None,
            unrolled_layers=0,
            eval_solver=None,
            skip_solved=False,
            out_indices=list(range(len(channels))),
            norm_eval=False,
            init_cfg=OF_THE_RELEASED_CODE,
        ),
        **changes,
    )


SMALL = dict(parameters=8_727_488, channels=[32, 64, 128, 256])
LARGE = dict(parameters=54_489_440, channels=[80, 160, 320, 640])
XL = dict(parameters=77_780_296, channels=[88, 176, 352, 704], expansion=6)


def neural_ode(parameters: int, hidden: int, augmented: int, steps: int = 0) -> Values:
    """A Neural ODE at the size of the image. It has no f, and so no norms of f."""
    return dict(
        type='NeuralODEBackbone',
        parameters=parameters,
        frozen=0,
        batch_norms=[],
        init_cfg=None,
        hidden_channels=hidden,
        augment_channels=augmented,
        tol=1e-3,
        steps=steps,
    )


# --- Necks, heads and losses ------------------------------------------------------------------


def cross_entropy(
    weight: float = 1.0, class_weight: list[float] | None = None, sigmoid: bool = False
) -> Values:
    return dict(
        type='CrossEntropyLoss',
        use_sigmoid=sigmoid,
        loss_weight=weight,
        class_weight=class_weight,
    )


def fuse_neck(
    in_channels: list[int],
    head_channels: list[int],
    out_channels: int,
    init_cfg: Any = (
        dict(type='Normal', layer='Conv2d', std=0.01),
        dict(type='Constant', layer='_BatchNorm', val=1),
    ),
) -> list[Values]:
    """All scales brought to the lowest one, then the mean over the image."""
    neck = dict(
        type='MDEQFuseNeck',
        in_channels=in_channels,
        head_channels=head_channels,
        out_channels=out_channels,
        batch_norms=[['BatchNorm2d', 0.1]],
        init_cfg=list(init_cfg) if isinstance(init_cfg, tuple) else init_cfg,
    )
    return [neck, dict(type='GlobalAveragePooling')]


def classifier(
    parameters: int, neck: list[Values], classes: int, topk: tuple[int, ...] = (1, 5)
) -> Values:
    return dict(
        model='ImageClassifier',
        preprocessor=None,
        parameters=parameters,
        batch_norms=[['BatchNorm2d', 0.1]],
        test_cfg=None,
        train_cfg=None,
        neck=neck,
        head=dict(
            type='LinearClsHead',
            in_channels=neck[0]['out_channels'],
            num_classes=classes,
            loss_module=cross_entropy(),
            topk=list(topk),
        ),
    )


def neural_ode_classifier(parameters: int, channels: int) -> Values:
    """A linear layer reads the whole state."""
    return dict(
        model='ImageClassifier',
        preprocessor=None,
        parameters=parameters,
        batch_norms=[],
        test_cfg=None,
        train_cfg=None,
        neck=dict(
            type='LinearNeck',
            in_channels=channels * 32 * 32,
            out_channels=10,
            norm_cfg=None,
            act_cfg=None,
            gap=dict(type='Identity'),
        ),
        head=dict(type='ClsHead', loss_module=cross_entropy(), topk=[1]),
    )


def fcn_head(
    in_channels: list[int],
    channels: int,
    classes: int = 19,
    align_corners: bool = True,
    class_weight: list[float] | None = None,
) -> Values:
    """Upsample all scales to the first, concatenate, 1x1 convolution, 1x1 to the classes."""
    return dict(
        type='FCNHead',
        in_channels=sum(in_channels),
        in_index=list(range(len(in_channels))),
        input_transform='resize_concat',
        channels=channels,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0,
        num_classes=classes,
        align_corners=align_corners,
        loss_decode=cross_entropy(class_weight=class_weight),
    )


def segmentor(parameters: int, head: Values, batch_norms: list[tuple[str, float]]) -> Values:
    return dict(
        model='EncoderDecoder',
        preprocessor='SegDataPreProcessor',
        parameters=parameters,
        batch_norms=[list(norm) for norm in batch_norms],
        test_cfg=dict(mode='whole'),
        train_cfg=None,
        neck=None,
        head=head,
        auxiliary_head=False,
    )


def cityscapes_segmentor(official: int, channels: list[int]) -> Values:
    """The official network without the bias before the head's batch norm, as wide as all scales."""
    width = sum(channels)
    return segmentor(official - width, fcn_head(channels, width), [('SyncBatchNorm', 0.01)])


# --- Training ---------------------------------------------------------------------------------


def adam(lr: float, weight_decay: float) -> Values:
    return dict(
        type='Adam',
        lr=lr,
        betas=[0.9, 0.999],
        eps=1e-8,
        weight_decay=weight_decay,
        amsgrad=False,
        maximize=False,
    )


def sgd(lr: float, weight_decay: float, nesterov: bool = False) -> Values:
    return dict(
        type='SGD',
        lr=lr,
        momentum=0.9,
        dampening=0,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=False,
    )


def cosine(end: int, begin: int = 0) -> Values:
    """From the base rate to zero, with a step every iteration."""
    return dict(
        type='CosineAnnealingLR',
        begin=begin,
        end=end,
        T_max=end - begin,
        eta_min=0.0,
        by_epoch=False,
        param_name='lr',
    )


def linear_start(end: int, start_factor: float) -> Values:
    return dict(
        type='LinearLR',
        begin=0,
        end=end,
        start_factor=start_factor,
        end_factor=1.0,
        by_epoch=False,
        param_name='lr',
    )


def warmup(iters: int, layers: int, softplus: int | None = None) -> Values:
    """Unrolled layers first, with softplus for as long unless stated otherwise."""
    return dict(
        type='MDEQWarmupHook',
        unrolled_iters=iters,
        unrolled_layers=layers,
        softplus_iters=iters if softplus is None else softplus,
    )


def penalty_schedule(
    step: float = 0.0, interval: int | None = None, begin: int = 0, end: int | None = None
) -> Values:
    """How the weight of the Jacobian penalty grows, from where, and when it ends."""
    return dict(
        type='MDEQRegularizerHook',
        weight_step=step,
        step_interval=interval,
        begin_iter=begin,
        end_iter=end,
    )


def training(
    optimizer: Values,
    schedule: list[Values],
    length: tuple[int, str],
    batch: int,
    gpus: int,
    warmup: Values | None,
    val_interval: int = 1,
    seed: int | None = None,
    penalty: Values | None = None,
) -> Values:
    """``batch`` images on each of ``gpus``: the learning rate is for all of them together."""
    return dict(
        optimizer=optimizer,
        parameter_groups=1,
        parameters_left_out=0,
        wrapper='OptimWrapper',
        accumulated_batches=1,
        clip_grad=None,
        schedule=schedule,
        length=list(length),
        val_interval=val_interval,
        batch_size=batch,
        auto_scale_lr=dict(enable=False, base_batch_size=batch * gpus),
        warmup=warmup,
        penalty_schedule=penalty_schedule() if penalty is None else penalty,
        seed=seed,
        deterministic=False,
    )


def epochs(optimizer: Values, count: int, **options: Any) -> Values:
    return training(optimizer, [cosine(count * EPOCH)], (count, 'epochs'), **options)


def iterations(optimizer: Values, count: int, **options: Any) -> Values:
    return training(optimizer, [cosine(count)], (count, 'iterations'), **options)


def cityscapes(weight_decay: float, gpus: int, batch: int, warmup: Values) -> Values:
    """500 epochs of 2975 images, in whole thousands of iterations."""
    count = 1000 * round(500 * 2975 / (gpus * batch) / 1000)
    return iterations(
        sgd(0.01, weight_decay), count, batch=batch, gpus=gpus, warmup=warmup, val_interval=4000
    )


# --- Data -------------------------------------------------------------------------------------

LOAD_IMAGE = dict(type='LoadImageFromFile', color_type='color', to_float32=False)
LOAD_LABELS = dict(type='LoadAnnotations', with_seg=True, with_bbox=False, reduce_zero_label=None)
FLIP = dict(type='RandomFlip', prob=0.5, direction='horizontal')
DISTORT = dict(
    type='PhotoMetricDistortion',
    brightness_delta=32,
    contrast_lower=0.5,
    contrast_upper=1.5,
    saturation_lower=0.5,
    saturation_upper=1.5,
    hue_delta=18,
)
PACK = dict(type='PackInputs', input_key='img')
PACK_MAPS = dict(type='PackSegInputs')


def resize(scale: list[int] | None, factor: float | None = None) -> Values:
    """Resize to fit into a width and height, or by a factor."""
    return dict(
        type='Resize',
        scale=scale,
        scale_factor=None if factor is None else [factor, factor],
        keep_ratio=True,
        interpolation='bilinear',
    )


def random_scale(width: int, height: int, low: float, high: float) -> Values:
    return {
        'type': 'RandomResize',
        'scale': [width, height],
        'ratio_range': [low, high],
        'resize.keep_ratio': True,
        'resize.interpolation': 'bilinear',
    }


def random_crop(rows: int, columns: int, cat_max_ratio: float) -> Values:
    return dict(type='RandomCrop', crop_size=[rows, columns], cat_max_ratio=cat_max_ratio)


def loader(workers: int, sampler: str, shuffle: bool, collate: str, **options: Any) -> Values:
    return dict(
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=False,
        sampler=sampler,
        shuffle=shuffle,
        batch_sampler='BatchSampler',
        collate_fn=collate,
        **options,
    )


def data(
    train: Values,
    val: Values,
    pipelines: tuple[list[Values], list[Values]],
    loaders: tuple[Values, Values],
    shapes: tuple[list[int], list[int]],
    preprocessor: Values,
    labels: list[int] | None = None,
) -> Values:
    """A data set's own, for training, and for validation and test alike."""
    told = dict(
        train_dataset=train,
        train_pipeline=pipelines[0],
        train_loader=loaders[0],
        train_input=shapes[0],
        preprocessor=preprocessor,
    )
    for name in ('val', 'test'):
        told[f'{name}_dataset'] = val
        told[f'{name}_pipeline'] = pipelines[1]
        told[f'{name}_loader'] = loaders[1]
        told[f'{name}_input'] = shapes[1]
        if labels is not None:
            told[f'{name}_labels'] = labels
    return told


def of_images(mean: list[float], std: list[float], order: str, classes: int) -> Values:
    return dict(
        type='ClsDataPreprocessor',
        order=order,
        mean=mean,
        std=std,
        num_classes=classes,
        padding=dict(pad_size_divisor=1, pad_value=0),
    )


# For ImageNet, in RGB on the scale of 255.
IMAGENET_MEAN, IMAGENET_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def of_maps(rows: int, columns: int) -> Values:
    """Padded to the size of the crop; 255 marks pixels without a class."""
    return dict(
        type='SegDataPreProcessor',
        order='RGB',
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        num_classes=None,
        padding=dict(size=[rows, columns], pad_val=0, seg_pad_val=255),
    )


def cifar10(split: str) -> Values:
    return dict(
        type='CIFAR10',
        data_root='data/cifar10',
        split=split,
        data_prefix=dict(root='data/cifar10/'),
        ann_file='',
        test_mode=split == 'test',
        filter_cfg=None,
        classes=10,
    )


def cifar10_data(train_pipeline: list[Values]) -> Values:
    return data(
        cifar10('train'),
        cifar10('test'),
        (train_pipeline, [PACK]),
        (
            loader(2, 'DefaultSampler', True, 'default_collate'),
            loader(2, 'DefaultSampler', False, 'default_collate', batch_size=100),
        ),
        ([3, 32, 32], [3, 32, 32]),
        of_images(
            [0.4914 * 255, 0.4822 * 255, 0.4465 * 255],
            [0.2023 * 255, 0.1994 * 255, 0.2010 * 255],
            'RGB',
            10,
        ),
    )


CIFAR10 = cifar10_data([PACK])
CIFAR10_AUGMENTED = cifar10_data(
    [
        dict(
            type='RandomCrop',
            crop_size=[32, 32],
            padding=4,
            padding_mode='constant',
            pad_if_needed=False,
        ),
        FLIP,
        PACK,
    ]
)


def cifar10_folder(split: str) -> Values:
    return dict(
        type='CustomDataset',
        data_root='data/cifar10_images',
        data_prefix=dict(img_path=f'data/cifar10_images/{split}'),
        ann_file='',
        test_mode=False,
        filter_cfg=None,
        classes=None,
        palette=None,
    )


# What enters the net is as it is for CIFAR10, though images are read as BGR.
CIFAR10_FOLDERS = data(
    cifar10_folder('train'),
    cifar10_folder('test'),
    ([LOAD_IMAGE, PACK], [LOAD_IMAGE, PACK]),
    (
        loader(0, 'DefaultSampler', True, 'default_collate'),
        loader(0, 'DefaultSampler', False, 'default_collate', batch_size=100),
    ),
    ([3, 32, 32], [3, 32, 32]),
    CIFAR10['preprocessor'],
)


def digits(split: str) -> Values:
    return dict(
        type='CustomDataset',
        data_root='data/digits',
        data_prefix=dict(img_path=f'data/digits/{split}'),
        ann_file='',
        test_mode=False,
        filter_cfg=None,
        classes=None,
        palette=None,
    )


DIGITS = data(
    digits('train'),
    digits('test'),
    ([LOAD_IMAGE, PACK], [LOAD_IMAGE, PACK]),
    (
        loader(1, 'DefaultSampler', True, 'default_collate'),
        loader(1, 'DefaultSampler', False, 'default_collate', batch_size=60),
    ),
    ([3, 16, 16], [3, 16, 16]),
    # Three equal channels, as loaded: (v / 255 - 0.3) / 0.35.
    of_images([0.3 * 255] * 3, [0.35 * 255] * 3, 'BGR', 10),
)


def imagenet(split: str) -> Values:
    return dict(
        type='ImageNet',
        data_root='data/imagenet',
        data_prefix=dict(img_path=f'data/imagenet/{split}'),
        ann_file='',
        test_mode=False,
        filter_cfg=None,
        classes=1000,
    )


IMAGENET = data(
    imagenet('train'),
    imagenet('val'),
    (
        [
            LOAD_IMAGE,
            dict(
                type='RandomResizedCrop',
                scale=[224, 224],
                crop_ratio_range=[0.08, 1.0],
                aspect_ratio_range=[3 / 4, 4 / 3],
                interpolation='bilinear',
            ),
            FLIP,
            PACK,
        ],
        [
            LOAD_IMAGE,
            dict(type='ResizeEdge', edge='short', scale=256, interpolation='bilinear'),
            dict(type='CenterCrop', crop_size=[224, 224]),
            PACK,
        ],
    ),
    (
        loader(8, 'DefaultSampler', True, 'default_collate'),
        loader(8, 'DefaultSampler', False, 'default_collate', batch_size=32),
    ),
    ([3, 224, 224], [3, 224, 224]),
    of_images(IMAGENET_MEAN, IMAGENET_STD, 'RGB', 1000),
)


def cityscapes_set(split: str) -> Values:
    return dict(
        type='CityscapesDataset',
        data_root='data/cityscapes/',
        data_prefix=dict(
            img_path=f'data/cityscapes/leftImg8bit/{split}',
            seg_map_path=f'data/cityscapes/gtFine/{split}',
        ),
        ann_file='',
        img_suffix='_leftImg8bit.png',
        seg_map_suffix='_gtFine_labelTrainIds.png',
        test_mode=False,
        filter_cfg=None,
        classes=19,
    )


def cityscapes_data(rows: int, columns: int) -> Values:
    """Crops of so many rows and columns; evaluation of the image as it is, one scale, no flip."""
    return data(
        cityscapes_set('train'),
        cityscapes_set('val'),
        (
            [
                LOAD_IMAGE,
                LOAD_LABELS,
                random_scale(2048, 1024, 0.5, 2.0),
                random_crop(rows, columns, cat_max_ratio=0.75),
                FLIP,
                DISTORT,
                PACK_MAPS,
            ],
            [LOAD_IMAGE, LOAD_LABELS, PACK_MAPS],
        ),
        (
            loader(4, 'InfiniteSampler', True, 'pseudo_collate'),
            loader(4, 'DefaultSampler', False, 'pseudo_collate', batch_size=1),
        ),
        ([3, rows, columns], [3, 256, 512]),
        of_maps(rows, columns),
        labels=[256, 512],
    )


def folders(root: str, split: str, colours: dict[str, list[int]]) -> Values:
    return dict(
        type='BaseSegDataset',
        data_root=root,
        data_prefix=dict(
            img_path=f'{root}/images/{split}', seg_map_path=f'{root}/annotations/{split}'
        ),
        ann_file='',
        img_suffix='.png',
        seg_map_suffix='.png',
        test_mode=False,
        filter_cfg=None,
        classes=list(colours),
        palette=list(colours.values()),
    )


CAMVID_COLOURS = dict(
    sky=[128, 128, 128],
    building=[128, 0, 0],
    pole=[192, 192, 128],
    road=[128, 64, 128],
    pavement=[60, 40, 222],
    tree=[128, 128, 0],
    sign=[192, 128, 128],
    fence=[64, 64, 128],
    car=[64, 0, 128],
    pedestrian=[64, 64, 0],
    bicyclist=[0, 128, 192],
)
# Images of 480x360 enter at 240x180 and are judged by the labels at their own size.
CAMVID = data(
    folders('data/camvid', 'train', CAMVID_COLOURS),
    folders('data/camvid', 'val', CAMVID_COLOURS),
    (
        [
            LOAD_IMAGE,
            LOAD_LABELS,
            random_scale(240, 180, 0.75, 2.0),
            random_crop(160, 224, cat_max_ratio=0.75),
            FLIP,
            DISTORT,
            PACK_MAPS,
        ],
        [
            LOAD_IMAGE,
            resize([240, 180]),
            LOAD_LABELS,
            PACK_MAPS,
        ],
    ),
    (
        loader(0, 'InfiniteSampler', True, 'pseudo_collate'),
        loader(0, 'DefaultSampler', False, 'pseudo_collate', batch_size=1),
    ),
    ([3, 160, 224], [3, 180, 240]),
    of_maps(160, 224),
    labels=[360, 480],
)

SCENES_COLOURS = {
    '0': [230, 25, 75],
    '1': [60, 180, 75],
    '2': [255, 225, 25],
    '3': [0, 130, 200],
    '4': [245, 130, 48],
    '5': [145, 30, 180],
    '6': [70, 240, 240],
    '7': [240, 50, 230],
    '8': [210, 245, 60],
    '9': [250, 190, 212],
    'background': [60, 60, 60],
}


def digit_scenes(*last: Values) -> Values:
    """No flip: a mirrored digit is not a digit."""
    return data(
        folders('data/digit_scenes', 'train', SCENES_COLOURS),
        folders('data/digit_scenes', 'val', SCENES_COLOURS),
        (
            [
                LOAD_IMAGE,
                LOAD_LABELS,
                random_scale(64, 64, 0.9, 1.25),
                random_crop(64, 64, cat_max_ratio=1.0),
                DISTORT,
                PACK_MAPS,
                *last,
            ],
            [LOAD_IMAGE, LOAD_LABELS, PACK_MAPS, *last],
        ),
        (
            loader(1, 'InfiniteSampler', True, 'pseudo_collate'),
            loader(1, 'DefaultSampler', False, 'pseudo_collate', batch_size=25),
        ),
        ([3, 64, 64], [3, 64, 64]),
        of_maps(64, 64),
        labels=[64, 64],
    )


# --- Evaluation -------------------------------------------------------------------------------


def evaluation(*metrics: Values, tta: list[list[Values]] | None = None) -> Values:
    """The same metrics in validation and test; views of test-time augmentation."""
    told = dict(
        val=list(metrics),
        test=list(metrics),
        loops=['ValLoop', 'TestLoop'],
        annotations=[],
        tta_model=None,
    )
    if tta is not None:
        told.update(tta_model='SegTTAModel', tta_first=[LOAD_IMAGE], tta_views=tta)
    return told


def accuracy(*topk: int) -> Values:
    return dict(type='Accuracy', topk=list(topk), thrs=[0.0])


MIOU = dict(type='IoUMetric', metrics=['mIoU'], ignore_index=255)


def ratios(*values: float) -> list[Values]:
    return [resize(None, ratio) for ratio in values]


def views(sizes: list[Values], flips: bool = True) -> list[list[Values]]:
    """Every size, both as it is and mirrored."""
    mirrors = [[dict(FLIP, prob=0.0)], [dict(FLIP, prob=1.0)]] if flips else [[]]
    return [[size, *mirror, LOAD_LABELS, PACK_MAPS] for size in sizes for mirror in mirrors]


# --- Runtime ----------------------------------------------------------------------------------


def runtime(
    scope: str,
    visualizer: str,
    visualization: Values,
    logger: Values,
    checkpoint: Values,
    by_epoch: bool,
    name: str | None = 'visualizer',
    warmup: bool = True,
    cudnn_benchmark: bool = True,
) -> Values:
    """Hooks in the order they run, including the guard against nan steps."""
    return dict(
        scope=scope,
        custom_imports=dict(imports=['mdeq_mm'], allow_failed_imports=False),
        hooks=[
            dict(type='RuntimeInfoHook'),
            dict(type='NonFiniteGradientHook', max_in_a_row=50),
            dict(type='SolverStatsHook', interval=10, warn_residual=0.1, patience=20),
            dict(type='MDEQRegularizerHook'),
            *([dict(type='MDEQWarmupHook')] if warmup else []),
            dict(type='IterTimerHook'),
            dict(type='DistSamplerSeedHook'),
            visualization,
            dict(dict(type='LoggerHook', log_metric_by_epoch=by_epoch, ignore_last=True), **logger),
            dict(type='ParamSchedulerHook'),
            dict(
                dict(
                    type='MDEQCheckpointHook', by_epoch=by_epoch, max_keep_ckpts=2, save_last=True
                ),
                **checkpoint,
            ),
            dict(type='IterationSeedHook'),
        ],
        custom_hooks=[],
        visualizer=dict(type=visualizer, name=name, backends=['LocalVisBackend']),
        log_by_epoch=by_epoch,
        log_level='INFO',
        load_from=None,
        resume=False,
        cudnn_benchmark=cudnn_benchmark,
        # OpenCV's own threads would add to those of the loaders.
        processes=['fork', 1],
        backend='nccl',
    )


def of_classification(log: int = 100, warmup: bool = True) -> Values:
    return runtime(
        'mmpretrain',
        'UniversalVisualizer',
        dict(type='VisualizationHook', enable=False, interval=5000),
        dict(interval=log),
        dict(interval=1, save_best=['accuracy/top1']),
        by_epoch=True,
        name=None,
        warmup=warmup,
    )


def of_segmentation(log: int = 50, save: int = 4000, warmup: bool = True) -> Values:
    return runtime(
        'mmseg',
        'SegLocalVisualizer',
        dict(type='SegVisualizationHook', draw=False, interval=50),
        dict(interval=log),
        dict(interval=save, save_best=['mIoU']),
        by_epoch=False,
        warmup=warmup,
    )


# --- The configs ------------------------------------------------------------------------------

TINY_NECK = fuse_neck([24, 24], [8, 16], 200)
LARGE_CIFAR10_CLASSIFIER = classifier(
    11_098_398, fuse_neck([32, 64, 128, 256], [14, 28, 56, 112], 1680), 10
)
SMALL_NECK = fuse_neck([32, 64, 128, 256], [24, 48, 96, 192], 2048)
LARGE_NECK = fuse_neck([80, 160, 320, 640], [32, 64, 128, 256], 2048)
XL_NECK = fuse_neck([88, 176, 352, 704], [32, 64, 128, 256], 2048)

# One over the square root of a class's share of the pixels, in the order of CAMVID_COLOURS.
CAMVID_WEIGHTS = [0.9, 0.75, 3.7, 0.65, 1.7, 1.15, 3.4, 3.3, 1.5, 4.3, 6.7]


CAMVID_SIZES = [resize([180, 135]), resize([240, 180]), resize([300, 225])]


def camvid_training(lr: float, warmup: Values | None) -> Values:
    return training(
        adam(lr, 1e-5),
        [linear_start(100, 0.1), cosine(2500, begin=100)],
        (2500, 'iterations'),
        batch=8,
        gpus=1,
        warmup=warmup,
        val_interval=500,
        seed=0,
    )


SCENES_BACKBONE = mdeq(
    351_904,
    [24, 40, 56],
    8,
    phantom(3, 0.5),
    solver=anderson(8, 5),
    jitter=[6, 12],
    regularizer=jacobian(1.0, 0.1),
    expansion=3,
    batch_norm=('BatchNorm2d', 0.05),
    init_cfg=KAIMING,
)
# Five pixels in six are background.
SCENES_HEAD = fcn_head([24, 40, 56], 80, 11, class_weight=[1.0] * 10 + [0.2])
SCENES_TRAINING = training(
    adam(4e-3, 1e-5),
    [linear_start(50, 0.1), cosine(1000, begin=50)],
    (1000, 'iterations'),
    batch=16,
    gpus=1,
    warmup=warmup(250, 5, softplus=100),
    val_interval=500,
)


# --- A detector: Faster R-CNN with FPN as mmdetection has it for ResNet-50, over MDEQ-small ----


def assigner(positive: float, negative: float, low_quality: bool) -> Values:
    return dict(
        type='MaxIoUAssigner',
        pos_iou_thr=positive,
        neg_iou_thr=negative,
        min_pos_iou=negative,
        match_low_quality=low_quality,
        ignore_iof_thr=-1,
    )


def sampler(num: int, positive: float, add_labels: bool) -> Values:
    return dict(
        type='RandomSampler',
        num=num,
        pos_fraction=positive,
        neg_pos_ub=-1,
        add_gt_as_proposals=add_labels,
    )


def proposals(before: int) -> Values:
    return dict(
        nms_pre=before,
        max_per_img=1000,
        nms=dict(type='nms', iou_threshold=0.7),
        min_bbox_size=0,
    )


L1 = dict(type='L1Loss', loss_weight=1.0)
FASTER_RCNN = dict(
    model='FasterRCNN',
    preprocessor='DetDataPreprocessor',
    parameters=26_112_352,
    batch_norms=[['SyncBatchNorm', 0.1]],
    neck=dict(
        type='FPN',
        in_channels=[32, 64, 128, 256],
        out_channels=256,
        num_outs=5,
        add_extra_convs=False,
    ),
    rpn=dict(
        type='RPNHead',
        in_channels=256,
        feat_channels=256,
        anchor_scales=[8.0],
        anchor_ratios=[0.5, 1.0, 2.0],
        anchor_strides=[[4, 4], [8, 8], [16, 16], [32, 32], [64, 64]],
        coder_stds=[1.0] * 4,
        loss_cls=cross_entropy(sigmoid=True),
        loss_bbox=L1,
    ),
    roi=dict(
        type='StandardRoIHead',
        extractor='SingleRoIExtractor',
        out_channels=256,
        strides=[4, 8, 16, 32],
        layer='RoIAlign',
        output_size=[7, 7],
        sampling_ratio=0,
    ),
    box=dict(
        type='Shared2FCBBoxHead',
        in_channels=256,
        fc_out_channels=1024,
        roi_feat_size=[7, 7],
        num_classes=80,
        coder_stds=[0.1, 0.1, 0.2, 0.2],
        reg_class_agnostic=False,
        loss_cls=cross_entropy(),
        loss_bbox=L1,
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=assigner(0.7, 0.3, low_quality=True),
            sampler=sampler(256, 0.5, add_labels=False),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=proposals(2000),
        rcnn=dict(
            assigner=assigner(0.5, 0.5, low_quality=False),
            sampler=sampler(512, 0.25, add_labels=True),
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        rpn=proposals(1000),
        rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
)


def coco(split: str) -> Values:
    return dict(
        type='CocoDataset',
        data_root='data/coco/',
        data_prefix=dict(img=f'data/coco/{split}/'),
        ann_file=f'data/coco/annotations/instances_{split}.json',
        seg_map_suffix='.png',
        test_mode=split.startswith('val'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32) if split.startswith('train') else None,
        classes=80,
    )


LOAD_BOXES = dict(type='LoadAnnotations', with_seg=False, with_bbox=True, reduce_zero_label=False)
TO_1333x800 = resize([1333, 800])
BOX_META = ['img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor']
COCO = data(
    coco('train2017'),
    coco('val2017'),
    (
        [
            LOAD_IMAGE,
            LOAD_BOXES,
            TO_1333x800,
            FLIP,
            dict(type='PackDetInputs', meta_keys=[*BOX_META, 'flip', 'flip_direction']),
        ],
        [LOAD_IMAGE, TO_1333x800, LOAD_BOXES, dict(type='PackDetInputs', meta_keys=BOX_META)],
    ),
    (
        dict(
            loader(4, 'DefaultSampler', True, 'pseudo_collate'),
            batch_sampler='AspectRatioBatchSampler',
        ),
        loader(4, 'DefaultSampler', False, 'pseudo_collate', batch_size=1),
    ),
    # 480x640 becomes 800x1067; padded to multiples of 32.
    ([3, 800, 1088], [3, 800, 1088]),
    dict(
        type='DetDataPreprocessor',
        order='RGB',
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        num_classes=None,
        padding=dict(pad_size_divisor=32, pad_value=0),
    ),
)
BOXES = dict(
    type='CocoMetric',
    metrics=['bbox'],
    proposal_nums=[100, 300, 1000],
    format_only=False,
    classwise=False,
)


def _cross_entropy(sigmoid: bool) -> Values:
    return dict(type='CrossEntropyLoss', use_sigmoid=sigmoid, loss_weight=1.0)


def _box_assigner(positive: float, negative: float, least: float, low_quality: bool) -> Values:
    return dict(
        type='MaxIoUAssigner',
        pos_iou_thr=positive,
        neg_iou_thr=negative,
        min_pos_iou=least,
        match_low_quality=low_quality,
        ignore_iof_thr=-1,
    )


def _box_sampler(num: int, positive: float, add_truth: bool) -> Values:
    return dict(
        type='RandomSampler',
        num=num,
        pos_fraction=positive,
        neg_pos_ub=-1,
        add_gt_as_proposals=add_truth,
    )


def _suppression(threshold: float) -> Values:
    return dict(type='nms', iou_threshold=threshold)


def _boxes(split: str, **options: Any) -> Values:
    return dict(
        type='CocoDataset',
        data_root='data/coco/',
        ann_file=f'annotations/instances_{split}.json',
        data_prefix=dict(img=f'{split}/'),
        **options,
    )


_BOX_LOADER = dict(num_workers=4, persistent_workers=True)
_BOX_RESIZE = dict(type='Resize', scale=[1333, 800], keep_ratio=True)
_BOX_EVALUATION = dict(
    batch_size=1,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=_boxes(
        'val2017',
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            _BOX_RESIZE,
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs', meta_keys=BOX_META),
        ],
    ),
    **_BOX_LOADER,
)
_BOX_METRIC = dict(
    type='CocoMetric', ann_file='data/coco/annotations/instances_val2017.json', metric='bbox'
)
# Faster R-CNN with FPN (Ren et al. 2015, Lin et al. 2017) as detectors are commonly trained on COCO
# for 12 epochs: by what the config says, since mmdetection, which builds it, is seldom installed.
DETECTOR = dict(
    model=dict(
        type='FasterRCNN',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        neck=dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=256, num_outs=5),
        rpn_head=dict(
            type='RPNHead',
            in_channels=256,
            feat_channels=256,
            anchor_generator=dict(
                type='AnchorGenerator',
                scales=[8],
                ratios=[0.5, 1.0, 2.0],
                strides=[4, 8, 16, 32, 64],
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[1.0] * 4),
            loss_cls=_cross_entropy(True),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
                out_channels=256,
                featmap_strides=[4, 8, 16, 32],
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
                reg_class_agnostic=False,
                loss_cls=_cross_entropy(False),
                loss_bbox=dict(type='L1Loss', loss_weight=1.0),
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=_box_assigner(0.7, 0.3, 0.3, True),
                sampler=_box_sampler(256, 0.5, False),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=dict(
                nms_pre=2000, max_per_img=1000, nms=_suppression(0.7), min_bbox_size=0
            ),
            rcnn=dict(
                assigner=_box_assigner(0.5, 0.5, 0.5, False),
                sampler=_box_sampler(512, 0.25, True),
                pos_weight=-1,
                debug=False,
            ),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=1000, max_per_img=1000, nms=_suppression(0.7), min_bbox_size=0),
            rcnn=dict(score_thr=0.05, nms=_suppression(0.5), max_per_img=100),
        ),
    ),
    train_dataloader=dict(
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=True),
        batch_sampler=dict(type='AspectRatioBatchSampler'),
        dataset=_boxes(
            'train2017',
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
                _BOX_RESIZE,
                dict(type='RandomFlip', prob=0.5),
                dict(type='PackDetInputs'),
            ],
        ),
        **_BOX_LOADER,
    ),
    val_dataloader=_BOX_EVALUATION,
    test_dataloader=_BOX_EVALUATION,
    val_evaluator=_BOX_METRIC,
    test_evaluator=_BOX_METRIC,
    default_scope='mmdet',
)

RECIPES: dict[str, dict[str, Values]] = dict(
    # Paper, Table 1.
    mdeq_tiny_cifar10=dict(
        backbone=mdeq(117_720, [24, 24], 22, exact(24), drop_rate=0.25, stem_strides=(1, 1)),
        heads=classifier(158_986, TINY_NECK, 10),
        training=epochs(adam(1e-3, 2.5e-6), 50, batch=64, gpus=2, warmup=warmup(3000, 10)),
        data=CIFAR10,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(),
    ),
    mdeq_large_cifar10=dict(
        backbone=mdeq(**SMALL, forward=18, gradient=exact(20), drop_rate=0.3, stem_strides=(1, 1)),
        heads=LARGE_CIFAR10_CLASSIFIER,
        training=epochs(adam(1e-3, 0), 220, batch=32, gpus=4, warmup=warmup(20_000, 10)),
        data=CIFAR10_AUGMENTED,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(),
    ),
    deq_tiny_cifar10=dict(
        backbone=mdeq(
            122_656, [32], 22, exact(24), drop_rate=0.25, expansion=6, stem_strides=(1, 1)
        ),
        heads=classifier(169_554, fuse_neck([32], [32], 200), 10),
        training=epochs(adam(1e-3, 2.5e-6), 50, batch=64, gpus=2, warmup=warmup(3000, 10)),
        data=CIFAR10,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(),
    ),
    node_cifar10=dict(
        backbone=neural_ode(140_622, hidden=124, augmented=0),
        heads=neural_ode_classifier(171_352, 3),
        training=epochs(adam(1e-3, 0), 50, batch=64, gpus=2, warmup=None),
        data=CIFAR10,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(warmup=False),
    ),
    anode_cifar10=dict(
        backbone=neural_ode(39_322, hidden=64, augmented=10),
        heads=neural_ode_classifier(172_452, 3 + 10),
        training=epochs(adam(1e-3, 0), 50, batch=64, gpus=2, warmup=None),
        data=CIFAR10,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(warmup=False),
    ),
    # The same table on a tenth of the images, nets of one size.
    mdeq_tiny_cifar10_5k=dict(
        backbone=mdeq(
            117_720,
            [24, 24],
            8,
            dict(type='JacobianFreeGradient'),
            drop_rate=0.25,
            stem_strides=(1, 1),
            solver=anderson(8, 5),
            jitter=[5, 20],
            regularizer=jacobian(1.0, 0.1),
        ),
        heads=classifier(160_218, fuse_neck([24, 24], [8, 16], 216), 10),
        training=epochs(adam(1e-3, 2.5e-6), 20, batch=64, gpus=1, warmup=warmup(0, 5)),
        data=CIFAR10_FOLDERS,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(log=20),
    ),
    deq_tiny_cifar10_5k=dict(
        backbone=mdeq(
            122_656,
            [32],
            8,
            dict(type='JacobianFreeGradient'),
            drop_rate=0.25,
            expansion=6,
            stem_strides=(1, 1),
            solver=anderson(8, 5),
            jitter=[5, 20],
            regularizer=jacobian(1.0, 0.1),
        ),
        heads=classifier(169_554, fuse_neck([32], [32], 200), 10),
        training=epochs(adam(1e-3, 2.5e-6), 20, batch=64, gpus=1, warmup=warmup(0, 5)),
        data=CIFAR10_FOLDERS,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(log=20),
    ),
    resnet18_w8_cifar10_5k=dict(
        backbone=dict(
            type='ResNet_CIFAR',
            parameters=175_752,
            frozen=0,
            batch_norms=[['BatchNorm2d', 0.1]],
            init_cfg=[
                dict(type='Kaiming', layer=['Conv2d']),
                dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
            ],
            depth=18,
            base_channels=8,
            stem_channels=8,
            strides=[1, 2, 2, 2],
        ),
        heads=dict(
            model='ImageClassifier',
            preprocessor=None,
            parameters=176_402,
            batch_norms=[['BatchNorm2d', 0.1]],
            test_cfg=None,
            train_cfg=None,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                in_channels=64,
                num_classes=10,
                loss_module=cross_entropy(),
                topk=[1, 5],
            ),
        ),
        training=epochs(adam(1e-3, 2.5e-6), 20, batch=64, gpus=1, warmup=warmup(0, 5)),
        data=CIFAR10_FOLDERS,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(log=20),
    ),
    node_cifar10_5k=dict(
        backbone=neural_ode(140_622, hidden=124, augmented=0, steps=1),
        heads=neural_ode_classifier(171_352, 3),
        training=epochs(adam(1e-3, 2.5e-6), 20, batch=64, gpus=1, warmup=warmup(0, 5)),
        data=CIFAR10_FOLDERS,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(log=20),
    ),
    anode_cifar10_5k=dict(
        backbone=neural_ode(39_322, hidden=64, augmented=10, steps=1),
        heads=neural_ode_classifier(172_452, 3 + 10),
        training=epochs(adam(1e-3, 2.5e-6), 20, batch=64, gpus=1, warmup=warmup(0, 5)),
        data=CIFAR10_FOLDERS,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(log=20),
    ),
    # Paper, Table 2.
    mdeq_small_imagenet=dict(
        backbone=mdeq(**SMALL, forward=26, gradient=exact(27)),
        heads=classifier(16_808_936, SMALL_NECK, 1000),
        training=epochs(
            sgd(0.05, 5e-5, nesterov=True), 100, batch=32, gpus=4, warmup=warmup(500_000, 5)
        ),
        data=IMAGENET,
        evaluation=evaluation(accuracy(1, 5)),
        runtime=of_classification(),
    ),
    mdeq_large_imagenet=dict(
        backbone=mdeq(**LARGE, forward=24, gradient=exact(24)),
        heads=classifier(67_063_624, LARGE_NECK, 1000),
        training=epochs(
            sgd(0.05, 1e-4, nesterov=True), 100, batch=28, gpus=4, warmup=warmup(550_000, 4)
        ),
        data=IMAGENET,
        evaluation=evaluation(accuracy(1, 5)),
        runtime=of_classification(),
    ),
    mdeq_xl_imagenet=dict(
        backbone=mdeq(**XL, forward=27, gradient=exact(27)),
        heads=classifier(90_463_280, XL_NECK, 1000),
        training=epochs(
            sgd(0.05, 7e-5, nesterov=True), 100, batch=24, gpus=8, warmup=warmup(400_000, 4)
        ),
        data=IMAGENET,
        evaluation=evaluation(accuracy(1, 5)),
        runtime=of_classification(),
    ),
    mdeq_unrolled5_large_imagenet=dict(
        backbone=mdeq(**LARGE, forward=24, gradient=exact(24), unrolled_layers=5),
        heads=classifier(67_063_624, LARGE_NECK, 1000),
        # As an explicit net from the first iteration to the last.
        training=epochs(sgd(0.05, 1e-4, nesterov=True), 100, batch=28, gpus=4, warmup=warmup(0, 4)),
        data=IMAGENET,
        evaluation=evaluation(accuracy(1, 5)),
        runtime=of_classification(),
    ),
    deq_small_imagenet=dict(
        backbone=mdeq(12_534_016, [352], 26, exact(27)),
        heads=classifier(17_990_888, fuse_neck([352], [256], 2048), 1000),
        training=epochs(
            sgd(0.05, 5e-5, nesterov=True), 100, batch=32, gpus=4, warmup=warmup(500_000, 5)
        ),
        data=IMAGENET,
        evaluation=evaluation(accuracy(1, 5)),
        runtime=of_classification(),
    ),
    # Jacobian regularization (Bai, Koltun & Kolter 2021).
    mdeq_large_cifar10_jac=dict(
        backbone=mdeq(
            **SMALL,
            forward=8,
            jitter=[6, 9],
            gradient=exact(7),
            drop_rate=0.22,
            stem_strides=(1, 1),
            regularizer=jacobian(0.4, 0.02),
        ),
        heads=LARGE_CIFAR10_CLASSIFIER,
        training=epochs(
            adam(1e-3, 0),
            220,
            batch=96,
            gpus=1,
            warmup=warmup(16_000, 8, softplus=0),
            penalty=penalty_schedule(end=90 * math.ceil(50_000 / 96)),
        ),
        data=CIFAR10_AUGMENTED,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(),
    ),
    mdeq_small_imagenet_jac=dict(
        backbone=mdeq(
            **SMALL,
            forward=14,
            jitter=[12, 15],
            gradient=exact(14),
            drop_rate=0.02,
            regularizer=jacobian(2.5, 0.08),
        ),
        heads=classifier(16_808_936, SMALL_NECK, 1000),
        training=epochs(
            sgd(0.04, 2e-5, nesterov=True),
            100,
            batch=32,
            gpus=4,
            warmup=warmup(510_000, 5, softplus=0),
            penalty=penalty_schedule(0.1, 50_000, 510_000),
        ),
        data=IMAGENET,
        evaluation=evaluation(accuracy(1, 5)),
        runtime=of_classification(),
    ),
    mdeq_large_imagenet_jac=dict(
        backbone=mdeq(
            **LARGE,
            forward=14,
            jitter=[12, 15],
            gradient=exact(14),
            regularizer=jacobian(3.0, 0.08),
        ),
        heads=classifier(67_063_624, LARGE_NECK, 1000),
        training=epochs(
            sgd(0.05, 1e-4, nesterov=True),
            100,
            batch=32,
            gpus=4,
            warmup=warmup(510_000, 4, softplus=0),
            penalty=penalty_schedule(0.1, 50_000, 510_000),
        ),
        data=IMAGENET,
        evaluation=evaluation(accuracy(1, 5)),
        runtime=of_classification(),
    ),
    # The phantom gradient (Geng et al. 2021): neither warm-up nor softplus.
    mdeq_tiny_cifar10_phantom=dict(
        backbone=mdeq(117_720, [24, 24], 22, phantom(5, 0.5), drop_rate=0.25, stem_strides=(1, 1)),
        heads=classifier(158_986, TINY_NECK, 10),
        training=epochs(adam(1e-3, 2.5e-6), 50, batch=64, gpus=2, warmup=warmup(0, 10)),
        data=CIFAR10,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(),
    ),
    mdeq_large_cifar10_phantom=dict(
        backbone=mdeq(**SMALL, forward=18, gradient=phantom(5, 0.7), stem_strides=(1, 1)),
        heads=LARGE_CIFAR10_CLASSIFIER,
        training=epochs(sgd(0.1, 1e-4), 220, batch=32, gpus=4, warmup=warmup(0, 10)),
        data=CIFAR10_AUGMENTED,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(),
    ),
    mdeq_small_imagenet_phantom=dict(
        backbone=mdeq(
            **SMALL,
            forward=26,
            gradient=phantom(5, 0.5),
            solver=dict(type='FixedPointIteration', max_iter=26, tol=1e-3, damping=1.0),
        ),
        heads=classifier(16_808_936, SMALL_NECK, 1000),
        training=epochs(sgd(0.05, 5e-5, nesterov=True), 100, batch=32, gpus=4, warmup=warmup(0, 5)),
        data=IMAGENET,
        evaluation=evaluation(accuracy(1, 5)),
        runtime=of_classification(),
    ),
    # Paper, Table 3.
    mdeq_small_cityscapes=dict(
        backbone=mdeq(
            **SMALL,
            forward=27,
            gradient=exact(30),
            drop_rate=0.05,
            batch_norm=('SyncBatchNorm', 0.01),
        ),
        heads=cityscapes_segmentor(8_968_467, SMALL['channels']),
        training=cityscapes(2e-4, gpus=4, batch=3, warmup=warmup(60_000, 3)),
        data=cityscapes_data(512, 1024),
        evaluation=evaluation(MIOU, tta=views(ratios(0.5, 0.75, 1.0, 1.25, 1.5, 1.75))),
        runtime=of_segmentation(),
    ),
    mdeq_large_cityscapes=dict(
        backbone=mdeq(
            **LARGE,
            forward=26,
            gradient=exact(26),
            drop_rate=0.03,
            batch_norm=('SyncBatchNorm', 0.01),
        ),
        heads=cityscapes_segmentor(55_955_859, LARGE['channels']),
        training=cityscapes(3e-4, gpus=4, batch=3, warmup=warmup(32_000, 3)),
        data=cityscapes_data(512, 1024),
        evaluation=evaluation(MIOU, tta=views(ratios(0.5, 0.75, 1.0, 1.25, 1.5, 1.75))),
        runtime=of_segmentation(),
    ),
    mdeq_xl_cityscapes=dict(
        backbone=mdeq(
            **XL,
            forward=26,
            gradient=exact(26),
            drop_rate=0.04,
            batch_norm=('SyncBatchNorm', 0.01),
        ),
        heads=cityscapes_segmentor(79_551_755, XL['channels']),
        training=cityscapes(3e-4, gpus=8, batch=2, warmup=warmup(40_000, 3)),
        data=cityscapes_data(768, 1024),
        evaluation=evaluation(MIOU, tta=views(ratios(0.5, 0.75, 1.0, 1.25, 1.5, 1.75))),
        runtime=of_segmentation(),
    ),
    # Not in the paper: small sets for a CPU, and a detector.
    mdeq_tiny_digits=dict(
        backbone=mdeq(
            117_720,
            [24, 24],
            8,
            dict(type='JacobianFreeGradient'),
            solver=anderson(8, 5),
            jitter=[5, 20],
            regularizer=jacobian(1.0, 0.1),
            drop_rate=0.1,
            stem_strides=(1, 1),
        ),
        heads=classifier(158_986, TINY_NECK, 10, topk=(1,)),
        training=epochs(adam(1e-3, 0), 12, batch=32, gpus=1, warmup=warmup(135, 5)),
        data=DIGITS,
        evaluation=evaluation(accuracy(1)),
        runtime=of_classification(log=15),
    ),
    mdeq_small_camvid=dict(
        backbone=mdeq(
            242_192,
            [16, 32, 64],
            10,
            phantom(3, 0.5),
            expansion=2,
            batch_norm=('BatchNorm2d', 0.05),
            init_cfg=KAIMING,
        ),
        heads=segmentor(
            256_203,
            fcn_head([16, 32, 64], 112, 11, align_corners=False, class_weight=CAMVID_WEIGHTS),
            [('BatchNorm2d', 0.05)],
        ),
        training=camvid_training(2e-3, warmup(1000, 5, softplus=100)),
        data=CAMVID,
        evaluation=evaluation(MIOU, tta=views(CAMVID_SIZES)),
        runtime=of_segmentation(save=500),
    ),
    hrnet_camvid=dict(
        backbone=dict(
            type='HRNet',
            parameters=250_656,
            frozen=0,
            batch_norms=[['SyncBatchNorm', 0.1]],
            init_cfg=[
                dict(type='Kaiming', layer='Conv2d'),
                dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
            ],
            block=['BOTTLENECK', 'BASIC', 'BASIC', 'BASIC'],
            num_modules=[1, 1, 1, 1],
            num_branches=[1, 2, 3, 4],
            num_blocks=[[1], [2, 2], [2, 2, 2], [2, 2, 2, 2]],
            num_channels=[[8], [16, 16], [16, 16, 24], [16, 16, 24, 32]],
        ),
        heads=segmentor(
            259_555,
            fcn_head([16, 16, 24, 32], 88, 11, align_corners=False, class_weight=CAMVID_WEIGHTS),
            [('BatchNorm2d', 0.05), ('SyncBatchNorm', 0.1)],
        ),
        training=camvid_training(5e-3, None),
        data=CAMVID,
        evaluation=evaluation(MIOU, tta=views(CAMVID_SIZES)),
        runtime=of_segmentation(save=500, warmup=False),
    ),
    mdeq_demo_digit_scenes=dict(
        backbone=SCENES_BACKBONE,
        heads=segmentor(362_555, SCENES_HEAD, [('BatchNorm2d', 0.05)]),
        training=SCENES_TRAINING,
        data=digit_scenes(),
        evaluation=evaluation(MIOU, tta=views(ratios(0.75, 1.0, 1.25), flips=False)),
        runtime=of_segmentation(log=20, save=500),
    ),
    mdeq_demo_multitask=dict(
        backbone=SCENES_BACKBONE,
        heads=dict(
            model='ImageClassifier',
            preprocessor='SegDataPreProcessor',
            parameters=541_365,
            batch_norms=[['BatchNorm2d', 0.05], ['BatchNorm2d', 0.1]],
            test_cfg=None,
            train_cfg=None,
            neck=None,
            head=dict(
                type='JointHead',
                seg=SCENES_HEAD,
                cls_neck=fuse_neck([24, 40, 56], [12, 20, 28], 256, KAIMING),
                cls=dict(
                    type='MultiLabelLinearClsHead',
                    in_channels=256,
                    num_classes=10,
                    # A mean over the ten digits.
                    loss_module=cross_entropy(0.1, sigmoid=True),
                    thr=0.5,
                    topk=None,
                ),
            ),
        ),
        training=SCENES_TRAINING,
        data=digit_scenes(dict(type='PresentClasses', num_classes=10)),
        evaluation=evaluation(
            MIOU,
            dict(type='AveragePrecision', average='macro'),
            dict(
                type='MultiLabelMetric',
                thr=0.5,
                topk=None,
                average='macro',
                items=['precision', 'recall', 'f1-score'],
            ),
        ),
        runtime=of_segmentation(log=20, save=500),
    ),
    mdeq_small_fpn_coco=dict(
        backbone=mdeq(**SMALL, forward=26, gradient=exact(27), batch_norm=('SyncBatchNorm', 0.1)),
        heads=FASTER_RCNN,
        training=training(
            sgd(0.02, 1e-4),
            [
                linear_start(500, 0.001),
                dict(
                    type='MultiStepLR',
                    begin=0,
                    end=12,
                    milestones={8: 1, 11: 1},
                    gamma=0.1,
                    by_epoch=True,
                    param_name='lr',
                ),
            ],
            (12, 'epochs'),
            batch=2,
            gpus=8,
            warmup=warmup(20_000, 5),
        ),
        data=COCO,
        evaluation=dict(
            evaluation(BOXES),
            annotations=['data/coco/annotations/instances_val2017.json'] * 2,
        ),
        runtime=runtime(
            'mmdet',
            'DetLocalVisualizer',
            dict(type='DetVisualizationHook', draw=False, interval=50),
            dict(interval=50),
            dict(interval=1, save_best=['coco/bbox_mAP']),
            by_epoch=True,
            cudnn_benchmark=False,
        ),
    ),
)
