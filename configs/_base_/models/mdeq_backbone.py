# The backbone of MDEQ-small, which the models of all tasks share. Wider ones override channels.
model = dict(
    backbone=dict(
        type='MDEQBackbone',
        channels=(32, 64, 128, 256),
        expansion=5,
        stem_strides=(2, 2),
        norm_cfg=dict(type='GN', num_groups=8),
        stem_norm_cfg=dict(type='BN'),
        solver=dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3, memory=5),
        gradient=dict(
            type='ImplicitGradient',
            solver=dict(type='LimitedMemoryBroyden', max_iter=27, tol=1e-3, memory=5),
        ),
    ),
)
