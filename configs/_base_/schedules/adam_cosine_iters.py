# Adam with cosine decay, counted in iterations.
_base_ = ['./cosine_iters.py']
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=2e-3, weight_decay=1e-5))
