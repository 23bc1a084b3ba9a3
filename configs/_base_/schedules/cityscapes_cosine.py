# 500 epochs of the 2975 training images at 12 a batch (3 on each of 4 GPUs). Cosine decay, as
# the paper says; the released trainer in fact decays by poly 0.9: see cityscapes_poly.py.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=2e-4),
    clip_grad=None,
)
param_scheduler = [dict(type='CosineAnnealingLR', begin=0, end=124000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=124000, val_interval=4000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=12)
