# A small MDEQ segments handwritten digits over photographs, in minutes on a CPU.
# Data: python tools/dataset_converters/digit_scenes.py data/digit_scenes (make demo does all).
_base_ = [
    './_base_/models/mdeq_segmentor.py',
    './_base_/datasets/digit_scenes.py',
    './_base_/schedules/adam_cosine_iters.py',
    './_base_/runtime_seg.py',
]
channels = (24, 40, 56)
norm_cfg = dict(type='BN', momentum=0.05)
model = dict(
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        channels=channels,
        expansion=3,
        stem_norm_cfg=norm_cfg,
        # In three quarters of the time of 10 evaluations, the exact gradient by 10 and 750 unrolled
        # iterations, and better.
        solver=dict(_delete_=True, type='Anderson', max_iter=8, jitter=(6, 12), memory=5),
        gradient=dict(_delete_=True, type='PhantomGradient', steps=3, damping=0.5),
        regularizer=dict(type='JacobianRegularizer', weight=1.0, probability=0.1),
        init_cfg=dict(type='Kaiming', layer='Conv2d'),
    ),
    decode_head=dict(
        in_channels=channels,
        in_index=(0, 1, 2),
        channels=80,
        num_classes=11,
        norm_cfg=norm_cfg,
        # Five pixels in six are background: at full weight it hides the digits for a long time.
        loss_decode=dict(class_weight=[1.0] * 10 + [0.2]),
    ),
)
max_iters = 1000
optim_wrapper = dict(optimizer=dict(lr=4e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=50, end=max_iters, T_max=max_iters - 50, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 2)
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max_iters // 2),
    warmup=dict(type='MDEQWarmupHook', unrolled_iters=250, unrolled_layers=5, softplus_iters=100),
)
