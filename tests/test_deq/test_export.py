"""A user's net around an ImplicitLayer is exported with a dynamic batch."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils import parametrizations

from mdeq_mm.deq import (
    Anderson,
    FixedPointIteration,
    ImplicitLayer,
    LimitedMemoryBroyden,
    PhantomGradient,
)


class Net(nn.Module):
    """z = tanh(W z + V x) with a weight-normed W, on vectors or on maps of any size."""

    def __init__(self, solver, form):
        super().__init__()
        torch.manual_seed(0)
        self.mix = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.read = nn.Conv2d(3, 4, 1)
        self.implicit = ImplicitLayer(solver, PhantomGradient())
        self.form = form

    def f(self, z, x):
        return torch.tanh(0.5 * self.mix(z) + x)

    def forward(self, x):
        x = self.read(x)
        f = partial(self.f, x=x) if self.form == 'partial' else lambda z: self.f(z, x)
        if self.form == 'list':
            (z,) = self.implicit(lambda z: [self.f(z[0], x)], [torch.zeros_like(x)])
            return z
        return self.implicit(f, torch.zeros_like(x))


@pytest.mark.parametrize(
    'solver, form',
    [
        (FixedPointIteration, 'closure'),
        (Anderson, 'list'),
        (LimitedMemoryBroyden, 'partial'),
    ],
)
def test_an_own_net_is_exported_for_any_batch_and_size(solver, form):
    net = Net(solver(max_iter=4, tol=1e-3), form).eval()
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=(sizes,))
        exported = program.module()
        for shape in ((2, 3, 8, 8), (1, 3, 8, 8), (7, 3, 8, 8), (3, 3, 11, 6)):
            x = torch.randn(shape)
            torch.testing.assert_close(exported(x), net(x), atol=1e-5, rtol=1e-5)
