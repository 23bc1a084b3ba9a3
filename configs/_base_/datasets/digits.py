# scikit-learn's handwritten digits at 16x16, as tools/dataset_converters/digits.py writes them.
# A pixel v in 0..255 enters the network as (v / 255 - 0.3) / 0.35, in three equal channels.
_base_ = ['./classification.py']
dataset_type = 'CustomDataset'
data_root = 'data/digits'
data_preprocessor = dict(
    num_classes=10, mean=[76.5, 76.5, 76.5], std=[89.25, 89.25, 89.25], to_rgb=False
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(type=dataset_type, data_root=data_root, data_prefix='train', pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=60,
    num_workers=1,
    dataset=dict(type=dataset_type, data_root=data_root, data_prefix='test', pipeline=pipeline),
)
test_dataloader = val_dataloader
