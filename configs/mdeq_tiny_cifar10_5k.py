# MDEQ-tiny on a tenth of CIFAR-10, 5000 images for training and 1000 for testing, without
# augmentation: the paper's Table 1 in the small, which a CPU can train. The other rows of the table
# are deq_tiny_, resnet18_w8_, node_ and anode_cifar10_5k.py, trained alike; all five have 168,300
# parameters, give or take 5%. For that the head is a little wider than the paper's (200).
# Data: class folders, data_root/{train,test}/CLASS/*.
_base_ = [
    './_base_/models/mdeq_tiny_classifier.py',
    './_base_/datasets/cifar10_folders.py',
    './_base_/schedules/adam_cosine.py',
    './_base_/runtime_cls.py',
]
model = dict(
    backbone=dict(
        drop_rate=0.25,
        # What the study of recipes recommends.
        solver=dict(_delete_=True, type='Anderson', max_iter=8, jitter=(5, 20), memory=5),
        gradient=dict(_delete_=True, type='JacobianFreeGradient'),
        regularizer=dict(type='JacobianRegularizer', weight=1.0, probability=0.1),
    ),
    neck=[dict(_base_.model.neck[0], out_channels=216), _base_.model.neck[1]],
    head=dict(in_channels=216),
)
optim_wrapper = dict(optimizer=dict(weight_decay=2.5e-6))
epochs = 20
param_scheduler = [dict(_base_.param_scheduler[0], T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs)
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(logger=dict(interval=20), warmup=dict(type='MDEQWarmupHook'))
