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
        dict(_base_.model.neck[0], head_channels=(14, 28, 56, 112), out_channels=1680),
        _base_.model.neck[1],
    ],
    head=dict(num_classes=10, in_channels=1680),
)
epochs = 220
param_scheduler = [dict(_base_.param_scheduler[0], T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs)
auto_scale_lr = dict(base_batch_size=128)
default_hooks = dict(
    warmup=dict(
        type='MDEQWarmupHook', unrolled_iters=20000, unrolled_layers=10, softplus_iters=20000
    )
)
