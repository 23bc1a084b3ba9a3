# MDEQ (10M) on CIFAR-10 with the phantom gradient (Geng et al. 2021), without warm-up and dropout:
# 4 GPUs x 32 images.
_base_ = ['./mdeq_large_cifar10.py']
model = dict(
    backbone=dict(
        drop_rate=0.0,
        gradient=dict(_delete_=True, type='PhantomGradient', steps=5, damping=0.7),
    )
)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4))
default_hooks = dict(warmup=dict(unrolled_iters=0, softplus_iters=0))
