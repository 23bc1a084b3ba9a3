# Augmented Neural ODE on CIFAR-10 without augmentation of the images (paper, Table 1): 10 channels
# of zeros join the image. Needs torchdiffeq. 172,452 parameters; the paper's 172K.
_base_ = ['./node_cifar10.py']
model = dict(
    backbone=dict(hidden_channels=64, augment_channels=10),
    neck=dict(in_channels=(3 + 10) * 32 * 32),
)
