# Single-stream DEQ beside mdeq_tiny_cifar10_5k.py: one scale, at full size. 169,554 parameters.
_base_ = ['./mdeq_tiny_cifar10_5k.py']
model = dict(
    backbone=dict(channels=(32,), expansion=6),
    neck=[
        dict(
            _base_.model.neck[0],
            in_channels=(32,),
            head_channels=(32,),
            out_channels=200,
        ),
        _base_.model.neck[1],
    ],
    head=dict(in_channels=200),
)
