# Runtime of the detection configs. Counts epochs.
_base_ = ['./default_runtime.py']
default_scope = 'mmdet'
env_cfg = dict(cudnn_benchmark=False)  # almost every batch has another size
default_hooks = dict(
    checkpoint=dict(save_best='coco/bbox_mAP'),
    visualization=dict(type='DetVisualizationHook'),
)
visualizer = dict(type='DetLocalVisualizer', vis_backends=_base_.vis_backends, name='visualizer')
log_processor = dict(by_epoch=True)
