# MDEQ-XL on ImageNet, 8 GPUs x 24 images (paper, Table 2).
_base_ = ['./mdeq_large_imagenet.py']
channels = (88, 176, 352, 704)
model = dict(
    backbone=dict(
        channels=channels,
        expansion=6,
        solver=dict(max_iter=27),
        gradient=dict(solver=dict(max_iter=27)),
    ),
    neck=[dict(_base_.model.neck[0], in_channels=channels), _base_.model.neck[1]],
)
train_dataloader = dict(batch_size=24)
optim_wrapper = dict(optimizer=dict(weight_decay=7e-5))
auto_scale_lr = dict(base_batch_size=192)
default_hooks = dict(warmup=dict(unrolled_iters=400000, unrolled_layers=4, softplus_iters=400000))
