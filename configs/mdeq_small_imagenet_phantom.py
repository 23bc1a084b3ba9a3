# MDEQ-small on ImageNet with the phantom gradient and plain iteration (Geng et al. 2021), without
# warm-up: 4 GPUs x 32 images.
_base_ = ['./mdeq_small_imagenet.py']
model = dict(
    backbone=dict(
        solver=dict(_delete_=True, type='FixedPointIteration', max_iter=26, tol=1e-3),
        gradient=dict(_delete_=True, type='PhantomGradient', steps=5, damping=0.5),
    )
)
default_hooks = dict(warmup=dict(unrolled_iters=0, softplus_iters=0))
