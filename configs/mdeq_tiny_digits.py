# MDEQ-tiny on scikit-learn's handwritten digits: a classifier that trains in minutes on a CPU.
# Data: python tools/dataset_converters/digits.py data/digits
_base_ = [
    './_base_/models/mdeq_tiny_classifier.py',
    './_base_/datasets/digits.py',
    './_base_/schedules/adam_cosine.py',
    './_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(
        drop_rate=0.1,
        # The exact gradient by 12 evaluations takes twice the time, and a run by it has ended ten
        # points lower, at a residual of 0.18.
        solver=dict(_delete_=True, type='Anderson', max_iter=8, jitter=(5, 20), memory=5),
        gradient=dict(_delete_=True, type='JacobianFreeGradient'),
        regularizer=dict(type='JacobianRegularizer', weight=1.0, probability=0.1),
    ),
    head=dict(topk=(1,)),
)
epochs = 12
param_scheduler = [dict(_base_.param_scheduler[0], T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs)
auto_scale_lr = dict(base_batch_size=32)
default_hooks = dict(
    logger=dict(interval=15),
    warmup=dict(type='MDEQWarmupHook', unrolled_iters=135, unrolled_layers=5, softplus_iters=135),
)
