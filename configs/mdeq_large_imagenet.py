# MDEQ-large on ImageNet, 4 GPUs x 28 images (paper, Table 2).
_base_ = ['./mdeq_small_imagenet.py']
channels = (80, 160, 320, 640)
model = dict(
    backbone=dict(
        channels=channels,
        solver=dict(max_iter=24),
        gradient=dict(solver=dict(max_iter=24)),
    ),
    neck=[
        dict(_base_.model.neck[0], in_channels=channels, head_channels=(32, 64, 128, 256)),
        _base_.model.neck[1],
    ],
)
train_dataloader = dict(batch_size=28)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
auto_scale_lr = dict(base_batch_size=112)
default_hooks = dict(warmup=dict(unrolled_iters=550000, unrolled_layers=4, softplus_iters=550000))
