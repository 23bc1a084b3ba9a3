# Runtime of the classification configs. Counts epochs.
_base_ = ['./default_runtime.py']
default_scope = 'mmpretrain'
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook', enable=False),
)
visualizer = dict(type='UniversalVisualizer', vis_backends=_base_.vis_backends)
log_processor = dict(by_epoch=True)
