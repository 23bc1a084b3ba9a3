# 500 epochs of the 2975 training images at 12 a batch (3 on each of 4 GPUs). Cosine decay, as
# the paper says; the released trainer in fact decays by poly 0.9: see cityscapes_poly.py.
_base_ = ['./cosine_iters.py']
max_iters = 124000
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=2e-4),
    clip_grad=None,
)
param_scheduler = [dict(_base_.param_scheduler[0], end=max_iters)]
train_cfg = dict(max_iters=max_iters, val_interval=4000)
