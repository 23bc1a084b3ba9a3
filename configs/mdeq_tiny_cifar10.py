# MDEQ-tiny on CIFAR-10 without augmentation, 2 GPUs x 64 images (paper, Table 1).
_base_ = [
    './_base_/models/mdeq_tiny_classifier.py',
    './_base_/datasets/cifar10_no_aug.py',
    './_base_/schedules/adam_cosine.py',
    './_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(
        drop_rate=0.25,
        solver=dict(max_iter=22),
        gradient=dict(solver=dict(max_iter=24)),
    ),
)
optim_wrapper = dict(optimizer=dict(weight_decay=2.5e-6))
auto_scale_lr = dict(base_batch_size=128)
default_hooks = dict(
    warmup=dict(type='MDEQWarmupHook', unrolled_iters=3000, unrolled_layers=10, softplus_iters=3000)
)
