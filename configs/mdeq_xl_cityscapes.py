# MDEQ-XL on Cityscapes, 8 GPUs x 2 crops of 768x1024 (paper, Table 3).
_base_ = [
    './_base_/models/mdeq_segmentor.py',
    './_base_/datasets/cityscapes_1024x768.py',
    './_base_/schedules/cityscapes_cosine.py',
    './_base_/runtime_seg.py',
]
channels = (88, 176, 352, 704)
model = dict(
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        channels=channels,
        expansion=6,
        drop_rate=0.04,
        solver=dict(max_iter=26),
        gradient=dict(solver=dict(max_iter=26)),
    ),
    decode_head=dict(in_channels=channels, channels=1320),
)
# 500 epochs at 16 a batch.
max_iters = 93000
optim_wrapper = dict(optimizer=dict(weight_decay=3e-4))
param_scheduler = [dict(_base_.param_scheduler[0], end=max_iters)]
train_cfg = dict(max_iters=max_iters)
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(
    warmup=dict(
        type='MDEQWarmupHook', unrolled_iters=40000, unrolled_layers=3, softplus_iters=40000
    )
)
