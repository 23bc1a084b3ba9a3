# Segmentation data sets as this project's converters write them:
# data_root/{images,annotations}/{train,val}/*.png.
_base_ = ['./segmentation.py']
dataset_type = 'BaseSegDataset'
train_dataloader = dict(
    num_workers=1,
    dataset=dict(
        type=dataset_type,
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        img_suffix='.png',
        seg_map_suffix='.png',
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        type=dataset_type,
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        img_suffix='.png',
        seg_map_suffix='.png',
    ),
)
test_dataloader = val_dataloader
