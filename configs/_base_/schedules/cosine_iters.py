# Cosine decay to zero over a number of iterations. A config sets it in end and max_iters.
param_scheduler = [dict(type='CosineAnnealingLR', begin=0, end=1000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# Each config sets base_batch_size: the batch of all GPUs that its learning rate is for.
auto_scale_lr = dict(enable=False)
