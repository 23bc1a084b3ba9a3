# A small MDEQ segments handwritten digits over photographs, in minutes on a CPU.
# Data: python tools/dataset_converters/digit_scenes.py data/digit_scenes (make demo does all).
_base_ = [
    './_base_/models/mdeq_segmentor.py',
    './_base_/datasets/digit_scenes.py',
    './_base_/schedules/adam_cosine_iters.py',
    './_base_/runtime_seg.py',
]
channels = (16, 32, 64, 64)
norm_cfg = dict(type='BN', momentum=0.05)
model = dict(
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        channels=channels,
        expansion=2,
        stem_strides=(2, 1),
        stem_norm_cfg=norm_cfg,
        solver=dict(max_iter=10),
        gradient=dict(solver=dict(max_iter=10)),
    ),
    decode_head=dict(in_channels=channels, channels=128, num_classes=11, norm_cfg=norm_cfg),
)
max_iters = 700
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=50, end=max_iters, T_max=max_iters - 50, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 2)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_iters // 2))
custom_hooks = [
    dict(type='MDEQWarmupHook', unrolled_iters=450, unrolled_layers=5, softplus_iters=100),
    dict(type='SolverStatsHook'),
]
