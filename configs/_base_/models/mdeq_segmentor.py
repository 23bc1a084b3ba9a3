# MDEQ-small for segmentation. Wider models override channels and the head's in_channels.
norm_cfg = dict(type='SyncBN', momentum=0.01, requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='MDEQBackbone',
        channels=(32, 64, 128, 256),
        expansion=5,
        stem_strides=(2, 2),
        norm_cfg=dict(type='GN', num_groups=8),
        stem_norm_cfg=norm_cfg,
        solver=dict(type='LimitedMemoryBroyden', max_iter=27, tol=1e-3, memory=10),
        gradient=dict(
            type='ImplicitGradient',
            solver=dict(type='LimitedMemoryBroyden', max_iter=30, tol=1e-3, memory=10),
        ),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=(32, 64, 128, 256),
        in_index=(0, 1, 2, 3),
        input_transform='resize_concat',
        channels=480,
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
