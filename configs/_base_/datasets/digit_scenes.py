# Handwritten digits over photographs, as tools/dataset_converters/digit_scenes.py writes them:
# labels 0 to 9 are the digits, 10 is the background. No flip: a mirrored digit is no digit.
_base_ = ['./segmentation_folders.py']
data_root = 'data/digit_scenes'
crop_size = (64, 64)
metainfo = dict(
    classes=('0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'background'),
    palette=[
        [230, 25, 75],
        [60, 180, 75],
        [255, 225, 25],
        [0, 130, 200],
        [245, 130, 48],
        [145, 30, 180],
        [70, 240, 240],
        [240, 50, 230],
        [210, 245, 60],
        [250, 190, 212],
        [60, 60, 60],
    ],
)
data_preprocessor = dict(size=crop_size)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=crop_size, ratio_range=(0.9, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=ratio, keep_ratio=True)
                for ratio in (0.75, 1.0, 1.25)
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
train_dataloader = dict(
    batch_size=16, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(
    batch_size=25,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=_base_.test_pipeline),
)
test_dataloader = val_dataloader
