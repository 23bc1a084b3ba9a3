# 100 epochs of SGD with Nesterov momentum and cosine decay.
_base_ = ['./cosine_epochs.py']
epochs = 100
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-5),
)
param_scheduler = [dict(_base_.param_scheduler[0], T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs)
