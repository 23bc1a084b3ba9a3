# A small MDEQ on CamVid at 240x180, 11 classes: real images that a CPU can train on, in 20 minutes
# on one core. configs/hrnet_camvid.py is an explicit net of its size, trained alike.
# Data: python tools/dataset_converters/camvid.py DOWNLOAD data/camvid --size 240x180
_base_ = [
    './_base_/models/mdeq_segmentor.py',
    './_base_/datasets/camvid.py',
    './_base_/schedules/adam_cosine_iters.py',
    './_base_/runtime_seg.py',
]
channels = (16, 32, 64)
norm_cfg = dict(type='BN', momentum=0.05)
model = dict(
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        channels=channels,
        expansion=2,
        stem_norm_cfg=norm_cfg,
        solver=dict(max_iter=10),
        # Cheaper a step than ImplicitGradient with 8 products, and no worse in short trials.
        gradient=dict(_delete_=True, type='PhantomGradient', steps=3, damping=0.5),
        init_cfg=dict(type='Kaiming', layer='Conv2d'),
    ),
    decode_head=dict(
        in_channels=channels,
        in_index=(0, 1, 2),
        channels=112,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        # One over the square root of a class's share of the pixels, 1 on average over them.
        loss_decode=dict(class_weight=[0.9, 0.75, 3.7, 0.65, 1.7, 1.15, 3.4, 3.3, 1.5, 4.3, 6.7]),
    ),
)
randomness = dict(seed=0)
max_iters = 2500
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=100, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=100, end=max_iters, T_max=max_iters - 100, by_epoch=False),
]
# Data is loaded in the training process, so that a run takes one core.
train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_iters=max_iters, val_interval=500)
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(
    checkpoint=dict(interval=500),
    warmup=dict(type='MDEQWarmupHook', unrolled_iters=1000, unrolled_layers=5, softplus_iters=100),
)
