# MDEQ-tiny for ten classes: two scales, the first at the full size of the image.
_base_ = ['./mdeq_classifier.py']
model = dict(
    backbone=dict(channels=(24, 24), stem_strides=(1, 1)),
    neck=[
        dict(
            _base_.model.neck[0],
            in_channels=(24, 24),
            head_channels=(8, 16),
            out_channels=200,
        ),
        _base_.model.neck[1],
    ],
    head=dict(num_classes=10, in_channels=200),
)
