# Cosine decay over so many iterations, to zero. A config sets their number in end and max_iters.
param_scheduler = [dict(type='CosineAnnealingLR', begin=0, end=1000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# base_batch_size, which scaling wants as well, is a config's own: the batch that its rate is for.
auto_scale_lr = dict(enable=False)
