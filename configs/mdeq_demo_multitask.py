# One MDEQ, two tasks at once: where each digit is (segmentation) and which digits occur in the
# scene (multi-label classification). One equilibrium, two heads, the sum of both losses.
# Data: python tools/dataset_converters/digit_scenes.py data/digit_scenes
_base_ = ['./mdeq_demo_digit_scenes.py']
num_digits = 10
model = dict(
    _delete_=True,
    type='mmpretrain.ImageClassifier',
    data_preprocessor=_base_.data_preprocessor,
    backbone=_base_.model.backbone,
    head=dict(
        type='JointHead',
        seg=_base_.model.decode_head,
        cls_neck=[
            dict(
                type='MDEQFuseNeck',
                in_channels=_base_.channels,
                head_channels=[width // 2 for width in _base_.channels],
                out_channels=256,
                init_cfg=dict(type='Kaiming', layer='Conv2d'),
            ),
            dict(type='mmpretrain.GlobalAveragePooling'),
        ],
        cls=dict(
            type='mmpretrain.MultiLabelLinearClsHead',
            num_classes=num_digits,
            in_channels=256,
            # The loss sums over the digits: this weight makes it a mean, as the other is.
            loss=dict(
                type='mmpretrain.CrossEntropyLoss', use_sigmoid=True, loss_weight=1 / num_digits
            ),
        ),
    ),
)
present = dict(type='PresentClasses', num_classes=num_digits)
train_pipeline = [*_base_.train_pipeline, present]
test_pipeline = [*_base_.test_pipeline, present]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = [
    _base_.val_evaluator,
    dict(type='mmpretrain.AveragePrecision'),
    dict(type='mmpretrain.MultiLabelMetric', thr=0.5),
]
test_evaluator = val_evaluator
# MM's test-time augmentation averages maps or scores, not both.
tta_model = None
