# MDEQ (10M) on CIFAR-10 with augmentation, 4 GPUs x 32 images (paper, Table 1).
_base_ = [
    './_base_/models/mdeq_classifier.py',
    './_base_/datasets/cifar10.py',
    './_base_/schedules/adam_cosine.py',
    './_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(
        stem_strides=(1, 1),
        drop_rate=0.3,
        solver=dict(max_iter=18),
        gradient=dict(solver=dict(max_iter=20)),
    ),
    neck=[
        dict(
            type='MDEQFuseNeck',
            in_channels=(32, 64, 128, 256),
            head_channels=(14, 28, 56, 112),
            out_channels=1680,
        ),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(num_classes=10, in_channels=1680),
)
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        T_max=220,
        begin=0,
        end=220,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
train_cfg = dict(max_epochs=220)
default_hooks = dict(
    warmup=dict(
        type='MDEQWarmupHook', unrolled_iters=20000, unrolled_layers=10, softplus_iters=20000
    )
)
