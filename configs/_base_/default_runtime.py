# What every config shares: plugin, environment, hooks, logging. Runtimes of the projects add to it.
custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='MDEQCheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    seed=dict(type='IterationSeedHook'),
    nonfinite=dict(type='NonFiniteGradientHook'),
    solver_stats=dict(type='SolverStatsHook'),
    # Without a regularizer in the model it does nothing.
    regularizer=dict(type='MDEQRegularizerHook'),
)
vis_backends = [dict(type='LocalVisBackend')]
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
