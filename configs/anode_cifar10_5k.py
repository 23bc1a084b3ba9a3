# Augmented Neural ODE beside mdeq_tiny_cifar10_5k.py, the net of anode_cifar10.py: 10 channels of
# zeros join the image. Needs torchdiffeq. 172,452 parameters.
_base_ = ['./node_cifar10_5k.py']
model = dict(
    backbone=dict(hidden_channels=64, augment_channels=10),
    neck=dict(in_channels=(3 + 10) * 32 * 32),
)
