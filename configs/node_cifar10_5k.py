# Neural ODE beside mdeq_tiny_cifar10_5k.py, the net of node_cifar10.py: needs torchdiffeq. 171,352
# parameters. One Runge-Kutta step: dopri5 to 1e-3 and its adjoint take some 15 times as long.
_base_ = ['./mdeq_tiny_cifar10_5k.py']
model = dict(
    backbone=dict(
        _delete_=True, type='NeuralODEBackbone', hidden_channels=124, augment_channels=0, steps=1
    ),
    neck=dict(
        _delete_=True,
        type='LinearNeck',
        gap_dim=0,
        in_channels=3 * 32 * 32,
        out_channels=10,
        norm_cfg=None,
    ),
    head=dict(_delete_=True, type='ClsHead', loss=dict(type='CrossEntropyLoss', loss_weight=1.0)),
)
