# MDEQ-tiny on scikit-learn's handwritten digits: a classifier that trains in minutes on a CPU.
# Data: python tools/dataset_converters/digits.py data/digits
_base_ = [
    './_base_/models/mdeq_classifier.py',
    './_base_/datasets/digits.py',
    './_base_/schedules/adam_cosine.py',
    './_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(
        channels=(24, 24),
        stem_strides=(1, 1),
        drop_rate=0.1,
        solver=dict(max_iter=12),
        gradient=dict(solver=dict(max_iter=12)),
    ),
    neck=[
        dict(type='MDEQFuseNeck', in_channels=(24, 24), head_channels=(8, 16), out_channels=200),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(num_classes=10, in_channels=200, topk=(1,)),
)
epochs = 12
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        T_max=epochs,
        begin=0,
        end=epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
train_cfg = dict(max_epochs=epochs)
default_hooks = dict(
    logger=dict(interval=15),
    warmup=dict(type='MDEQWarmupHook', unrolled_iters=135, unrolled_layers=5, softplus_iters=135),
)
