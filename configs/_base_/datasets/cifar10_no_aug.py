# CIFAR-10 without augmentation, 64 for each GPU.
_base_ = ['./cifar10.py']
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=[dict(type='PackInputs')]))
