# MDEQ-large as an explicit net of 5 weight-tied layers, backpropagated through all of them (paper,
# Table 2, "Unrolled 5-layer MDEQ-large"): unrolled from the first iteration to the last, in
# training and evaluation, so the warm-up has no iterations.
_base_ = ['./mdeq_large_imagenet.py']
model = dict(backbone=dict(unrolled_layers=5))
default_hooks = dict(warmup=dict(unrolled_iters=0, softplus_iters=0))
