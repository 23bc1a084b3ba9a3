# The explicit net beside mdeq_tiny_cifar10_5k.py: ResNet-18 for CIFAR at an eighth of its width, 8
# channels at the first stage. 176,402 parameters.
_base_ = ['./mdeq_tiny_cifar10_5k.py']
model = dict(
    backbone=dict(_delete_=True, type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=8),
    neck=dict(_delete_=True, type='GlobalAveragePooling'),
    head=dict(in_channels=64),
)
