# Single-stream DEQ on CIFAR-10 without augmentation (paper, Table 1): one scale, at full size.
# 169,554 parameters; the paper's 170K.
_base_ = ['./mdeq_tiny_cifar10.py']
model = dict(
    backbone=dict(channels=(32,), expansion=6),
    neck=[
        dict(_base_.model.neck[0], in_channels=(32,), head_channels=(32,), out_channels=200),
        _base_.model.neck[1],
    ],
)
