"""Training in bfloat16 by the optimizer wrapper."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

from mdeq_mm.optim import has_bfloat16


class Net(nn.Module):
    """An MDEQ of two scales that notes in what dtype its f computed."""

    def __init__(self) -> None:
        super().__init__()
        part = dict(type='FixedPointIteration', max_iter=4, tol=0.0)
        self.backbone = MODELS.build(
            dict(
                type='MDEQBackbone',
                channels=(8, 8),
                expansion=1,
                norm_cfg=dict(type='GN', num_groups=4),
                solver=part,
                gradient=dict(type='ImplicitGradient', solver=part),
            )
        )
        self.dtypes: set[torch.dtype] = set()
        for module in self.backbone.cell.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda *call: self.dtypes.add(call[2].dtype))

    def forward(self, images):
        return self.backbone(images)


def wrapper(net, **options):
    optimizer = dict(type='SGD', lr=0.1)
    return build_optim_wrapper(
        net, dict(type='BFloat16OptimWrapper', optimizer=optimizer, **options)
    )


def test_f_is_bfloat16_and_weights_and_maps_are_not():
    torch.manual_seed(0)
    net = Net()
    optim = wrapper(net, dtype='bfloat16')
    before = [p.detach().clone() for p in net.parameters()]
    with optim.optim_context(net):
        maps = net(torch.randn(2, 3, 16, 16))
    optim.update_params(sum(map.square().mean() for map in maps))
    assert net.dtypes == {torch.bfloat16}
    assert {map.dtype for map in maps} == {torch.float32}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before))
    net.dtypes.clear()
    net(torch.randn(2, 3, 16, 16))
    assert net.dtypes == {torch.float32}


def test_gradients_are_accumulated():
    torch.manual_seed(0)
    net, whole = nn.Linear(3, 1), nn.Linear(3, 1)
    whole.load_state_dict(net.state_dict())
    images = torch.randn(4, 3)
    for model, parts in ((net, 2), (whole, 1)):
        optim = wrapper(model, accumulative_counts=parts)
        for part in images.chunk(parts):
            with optim.optim_context(model):
                loss = model(part).float().mean()
            optim.update_params(loss)
    torch.testing.assert_close(net.weight, whole.weight, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize('dtype', ['float16', torch.float16, None])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=r'dtype=.*bfloat16 alone'):
        wrapper(nn.Linear(1, 1), dtype=dtype)


@pytest.mark.parametrize('available, supported', [(True, True), (True, False), (False, True)])
def test_a_cpu_without_the_instructions_has_no_bfloat16(monkeypatch, available, supported):
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: available)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: supported)
    assert has_bfloat16('cpu') == (available and supported)
    assert has_bfloat16('cuda')
