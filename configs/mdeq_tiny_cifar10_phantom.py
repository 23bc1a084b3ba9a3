# MDEQ-tiny on CIFAR-10 without augmentation, with the phantom gradient (Geng et al. 2021), without
# warm-up: 2 GPUs x 64 images.
_base_ = ['./mdeq_tiny_cifar10.py']
model = dict(
    backbone=dict(gradient=dict(_delete_=True, type='PhantomGradient', steps=5, damping=0.5))
)
default_hooks = dict(warmup=dict(unrolled_iters=0, softplus_iters=0))
