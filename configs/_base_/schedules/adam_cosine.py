# Adam with cosine decay, counted in epochs.
_base_ = ['./cosine_epochs.py']
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-3, weight_decay=0.0))
