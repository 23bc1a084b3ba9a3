# Neural ODE on CIFAR-10 without augmentation, 2 GPUs x 64 images (paper, Table 1): needs
# torchdiffeq. 171,352 parameters; the paper's 172K. The state keeps the image's shape; a linear
# layer reads all of it.
_base_ = [
    './_base_/datasets/cifar10_no_aug.py',
    './_base_/schedules/adam_cosine.py',
    './_base_/runtime_cls.py',
]
model = dict(
    type='ImageClassifier',
    backbone=dict(type='NeuralODEBackbone', hidden_channels=124, augment_channels=0, tol=1e-3),
    neck=dict(
        type='LinearNeck', gap_dim=0, in_channels=3 * 32 * 32, out_channels=10, norm_cfg=None
    ),
    head=dict(type='ClsHead', loss=dict(type='CrossEntropyLoss', loss_weight=1.0)),
)
auto_scale_lr = dict(base_batch_size=128)
