# CIFAR-10 as images in class folders, data_root/{train,test}/CLASS/*, without augmentation, 64 a
# step. Any share of the data set will do. Files are read anew each epoch: a tenth of a millisecond
# an image.
_base_ = ['./classification.py']
dataset_type = 'CustomDataset'
data_root = 'data/cifar10_images'
data_preprocessor = dict(
    num_classes=10,
    # As in cifar10.py, in the order red, green, blue.
    mean=[125.307, 122.961, 113.8575],
    std=[51.5865, 50.847, 51.255],
    to_rgb=True,  # images are read as BGR
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
# In the process itself: what it takes is what one core takes.
loading = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(type=dataset_type, data_root=data_root, data_prefix='train', pipeline=pipeline),
    **loading,
)
val_dataloader = dict(
    batch_size=100,
    dataset=dict(type=dataset_type, data_root=data_root, data_prefix='test', pipeline=pipeline),
    **loading,
)
test_dataloader = val_dataloader
