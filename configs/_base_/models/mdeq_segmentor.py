# MDEQ-small for segmentation. Wider models override channels and the head's in_channels.
_base_ = ['./mdeq_backbone.py']
norm_cfg = dict(type='SyncBN', momentum=0.01, requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        stem_norm_cfg=norm_cfg,
        solver=dict(max_iter=27),
        gradient=dict(solver=dict(max_iter=30)),
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
