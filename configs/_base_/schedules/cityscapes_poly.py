# The learning rate as the released segmentation trainer sets it. To use it, name this file in
# place of cityscapes_cosine.py in a config's _base_.
_base_ = ['./cityscapes_cosine.py']
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0, begin=0, end=_base_.max_iters, by_epoch=False)
]
