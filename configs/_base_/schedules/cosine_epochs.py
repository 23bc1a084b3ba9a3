# Cosine decay to zero over a number of epochs, with a step every iteration. A config sets that
# number in three places: T_max, end and max_epochs.
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        T_max=50,
        begin=0,
        end=50,
        by_epoch=True,
        convert_to_iter_based=True,
    )
]
train_cfg = dict(by_epoch=True, max_epochs=50, val_interval=1)
val_cfg = dict()
test_cfg = dict()
# Each config sets base_batch_size: the batch of all GPUs that its learning rate is for.
auto_scale_lr = dict(enable=False)
