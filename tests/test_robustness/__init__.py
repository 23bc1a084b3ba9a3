"""Bad input, odd shapes, use inside a framework, hostile files."""

from typing import Any

import torch
from mmengine.registry import MODELS

from mdeq_mm.models import MDEQBackbone

SOLVERS = ('FixedPointIteration', 'Anderson', 'LimitedMemoryBroyden')


def tiny_backbone(
    kind: str = 'Anderson', max_iter: int = 5, tol: float = 1e-4, **options: Any
) -> MDEQBackbone:
    """A backbone of two scales, in training mode; the same weights at each call."""
    torch.manual_seed(0)
    solver = dict(type=kind, max_iter=max_iter, tol=tol)
    default = dict(
        channels=(8, 16),
        expansion=1,
        stem_strides=(2,),
        norm_cfg=dict(type='GN', num_groups=4),
        solver=solver,
        gradient=dict(type='ImplicitGradient', solver=solver),
    )
    # norm_eval acts from the first call of train() on, which MM's loops make.
    return MODELS.build(dict(type='MDEQBackbone', **{**default, **options})).train()


def contracting(net: MDEQBackbone) -> MDEQBackbone:
    """Weights under which f contracts untrained: the injection outweighs the state."""
    cell = net.cell
    with torch.no_grad():
        cell.blocks[0].conv2.parametrizations.weight.original0.fill_(0.02)
        cell.fusions[0].sources['1'].norm.weight.fill_(0.1)
        cell.fusions[1].sources['0'][-1].weight.fill_(10.0)
        for fusion in cell.fusions:
            fusion.norm.weight.fill_(0.1)
    return net
