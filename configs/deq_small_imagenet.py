# Single-stream DEQ + global pool on ImageNet (paper, Table 2): one scale, a quarter of the image.
# 17,990,888 parameters; the paper's 18M. All of them work at the highest resolution, so an
# evaluation of f takes 28 times the multiplications that MDEQ-small's does.
_base_ = ['./mdeq_small_imagenet.py']
model = dict(
    backbone=dict(channels=(352,)),
    neck=[
        dict(_base_.model.neck[0], in_channels=(352,), head_channels=(256,)),
        _base_.model.neck[1],
    ],
)
