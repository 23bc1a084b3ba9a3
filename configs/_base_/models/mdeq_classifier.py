# MDEQ-small for ImageNet. Other models override widths; the head's in_channels are the neck's
# out_channels.
_base_ = ['./mdeq_backbone.py']
model = dict(
    type='ImageClassifier',
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
