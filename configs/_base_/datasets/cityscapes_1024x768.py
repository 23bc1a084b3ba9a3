# Cityscapes, crops of 768 rows x 1024 columns, 2 for each GPU.
_base_ = ['./cityscapes_1024x512.py']
crop_size = (768, 1024)
data_preprocessor = dict(size=crop_size)
train_pipeline = [
    dict(step, crop_size=crop_size) if step.type == 'RandomCrop' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
