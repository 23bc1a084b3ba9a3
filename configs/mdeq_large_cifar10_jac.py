# MDEQ (10M) on CIFAR-10 with Jacobian regularization, at 8 forward and 7 backward evaluations (Bai,
# Koltun & Kolter 2021): 1 GPU x 96 images. The values are those of the public configuration; the
# publication names a weight of 0.5 and a probability of 0.05. Its number of evaluations varies in
# iterations with a penalty only, ours in all of them.
_base_ = ['./mdeq_large_cifar10.py']
model = dict(
    backbone=dict(
        drop_rate=0.22,
        solver=dict(max_iter=8, jitter=(6, 9)),
        gradient=dict(solver=dict(max_iter=7)),
        regularizer=dict(type='JacobianRegularizer', weight=0.4, probability=0.02),
    )
)
train_dataloader = dict(batch_size=96)
auto_scale_lr = dict(base_batch_size=96)
default_hooks = dict(
    warmup=dict(unrolled_iters=16000, unrolled_layers=8, softplus_iters=0),
    # From epoch 90 on, of 521 iterations each, the penalty would outweigh the loss.
    regularizer=dict(end_iter=90 * 521),
)
