# MDEQ-large on Cityscapes, 4 GPUs x 3 crops of 512x1024 (paper, Table 3).
_base_ = ['./mdeq_small_cityscapes.py']
channels = (80, 160, 320, 640)
model = dict(
    backbone=dict(
        channels=channels,
        drop_rate=0.03,
        solver=dict(max_iter=26),
        gradient=dict(solver=dict(max_iter=26)),
    ),
    decode_head=dict(in_channels=channels, channels=1200),
)
optim_wrapper = dict(optimizer=dict(weight_decay=3e-4))
default_hooks = dict(warmup=dict(unrolled_iters=32000, unrolled_layers=3, softplus_iters=32000))
