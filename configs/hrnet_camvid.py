# An explicit net beside configs/mdeq_small_camvid.py: mmsegmentation's HRNet, so narrow that it has
# as many parameters. Data, augmentation, batches, loss, head and schedule are those of the MDEQ;
# the learning rate is its own.
_base_ = ['./mdeq_small_camvid.py']
channels = (16, 16, 24, 32)
basic = dict(num_modules=1, block='BASIC')
model = dict(
    backbone=dict(
        _delete_=True,
        type='HRNet',
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        extra=dict(
            stage1=dict(
                num_modules=1,
                block='BOTTLENECK',
                num_branches=1,
                num_blocks=(1,),
                num_channels=(8,),
            ),
            stage2=dict(basic, num_branches=2, num_blocks=(2,) * 2, num_channels=channels[:2]),
            stage3=dict(basic, num_branches=3, num_blocks=(2,) * 3, num_channels=channels[:3]),
            stage4=dict(basic, num_branches=4, num_blocks=(2,) * 4, num_channels=channels),
        ),
    ),
    decode_head=dict(in_channels=channels, in_index=(0, 1, 2, 3), channels=sum(channels)),
)
optim_wrapper = dict(optimizer=dict(lr=5e-3))
# No warm-up: nothing here can be unrolled.
default_hooks = dict(
    _delete_=True,
    **{name: hook for name, hook in _base_.default_hooks.items() if name != 'warmup'},
)
