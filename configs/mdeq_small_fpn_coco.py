# Faster R-CNN with FPN over MDEQ-small on COCO: the backbone in mmdetection, which needs mmcv with
# its compiled operators. Not in the paper. docs/transfer.md says how to start from ImageNet.
_base_ = [
    './_base_/models/mdeq_faster_rcnn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/detection_sgd_12e.py',
    './_base_/runtime_det.py',
]
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(
    warmup=dict(
        type='MDEQWarmupHook', unrolled_iters=20000, unrolled_layers=5, softplus_iters=20000
    )
)
