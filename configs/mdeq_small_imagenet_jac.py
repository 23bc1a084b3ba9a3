# MDEQ-small on ImageNet with Jacobian regularization, at 14 forward and 14 backward evaluations
# (Bai, Koltun & Kolter 2021): 4 GPUs x 32 images. In the published training the unrolled warm-up
# has a penalty as well, of weight 0.03, and the number of evaluations varies in iterations with a
# penalty only.
_base_ = ['./mdeq_small_imagenet.py']
model = dict(
    backbone=dict(
        drop_rate=0.02,
        solver=dict(max_iter=14, jitter=(12, 15)),
        gradient=dict(solver=dict(max_iter=14)),
        regularizer=dict(type='JacobianRegularizer', weight=2.5, probability=0.08),
    )
)
optim_wrapper = dict(optimizer=dict(lr=0.04, weight_decay=2e-5))
default_hooks = dict(
    warmup=dict(unrolled_iters=510000, softplus_iters=0),
    regularizer=dict(weight_step=0.1, step_interval=50000, begin_iter=510000),
)
