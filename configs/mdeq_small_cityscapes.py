# MDEQ-small on Cityscapes, 4 GPUs x 3 crops of 512x1024 (paper, Table 3).
_base_ = [
    './_base_/models/mdeq_segmentor.py',
    './_base_/datasets/cityscapes_1024x512.py',
    './_base_/schedules/cityscapes_cosine.py',
    './_base_/runtime_seg.py',
]
model = dict(data_preprocessor=_base_.data_preprocessor, backbone=dict(drop_rate=0.05))
auto_scale_lr = dict(base_batch_size=12)
default_hooks = dict(
    warmup=dict(
        type='MDEQWarmupHook', unrolled_iters=60000, unrolled_layers=3, softplus_iters=60000
    )
)
