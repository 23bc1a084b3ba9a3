# MDEQ-small for ImageNet. Other models override widths; the head follows out_channels.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='MDEQBackbone',
        channels=(32, 64, 128, 256),
        expansion=5,
        stem_strides=(2, 2),
        norm_cfg=dict(type='GN', num_groups=8),
        stem_norm_cfg=dict(type='BN'),
        solver=dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3, memory=10),
        gradient=dict(
            type='ImplicitGradient',
            solver=dict(type='LimitedMemoryBroyden', max_iter=27, tol=1e-3, memory=10),
        ),
    ),
    neck=[
        dict(
            type='MDEQFuseNeck',
            in_channels=(32, 64, 128, 256),
            head_channels=(24, 48, 96, 192),
            out_channels=2048,
        ),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5),
    ),
)
