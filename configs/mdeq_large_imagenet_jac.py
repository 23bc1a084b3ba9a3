# MDEQ-large on ImageNet with Jacobian regularization, at 14 forward and 14 backward evaluations
# (Bai, Koltun & Kolter 2021): 4 GPUs x 32 images. It differs from the published training as
# mdeq_small_imagenet_jac.py does.
_base_ = ['./mdeq_large_imagenet.py']
model = dict(
    backbone=dict(
        solver=dict(max_iter=14, jitter=(12, 15)),
        gradient=dict(solver=dict(max_iter=14)),
        regularizer=dict(type='JacobianRegularizer', weight=3.0, probability=0.08),
    )
)
train_dataloader = dict(batch_size=32)
auto_scale_lr = dict(base_batch_size=128)
default_hooks = dict(
    warmup=dict(unrolled_iters=510000, softplus_iters=0),
    regularizer=dict(weight_step=0.1, step_interval=50000, begin_iter=510000),
)
