# MDEQ-small on ImageNet, 4 GPUs x 32 images (paper, Table 2).
_base_ = [
    './_base_/models/mdeq_classifier.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedules/imagenet_sgd_100e.py',
    './_base_/runtime_cls.py',
]
auto_scale_lr = dict(base_batch_size=128)
default_hooks = dict(
    warmup=dict(
        type='MDEQWarmupHook', unrolled_iters=500000, unrolled_layers=5, softplus_iters=500000
    )
)
