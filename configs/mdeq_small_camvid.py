# A small MDEQ on CamVid at 240x180, 11 classes: the real benchmark a CPU can train.
# Data: python tools/dataset_converters/camvid.py DOWNLOAD data/camvid --size 240x180
_base_ = [
    './_base_/models/mdeq_segmentor.py',
    './_base_/datasets/camvid.py',
    './_base_/schedules/adam_cosine_iters.py',
    './_base_/runtime_seg.py',
]
channels = (16, 32, 64, 128)
norm_cfg = dict(type='BN', momentum=0.05)
model = dict(
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        channels=channels,
        expansion=2,
        drop_rate=0.05,
        stem_norm_cfg=norm_cfg,
        solver=dict(max_iter=14),
        gradient=dict(solver=dict(max_iter=14)),
    ),
    decode_head=dict(in_channels=channels, channels=240, num_classes=11, norm_cfg=norm_cfg),
)
max_iters = 3000
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=100, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=100, end=max_iters, T_max=max_iters - 100, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
custom_hooks = [
    dict(type='MDEQWarmupHook', unrolled_iters=1500, unrolled_layers=5, softplus_iters=1500),
    dict(type='SolverStatsHook'),
]
