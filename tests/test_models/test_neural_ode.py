"""The Neural ODE backbone: known solutions, and its gradient against unrolled autograd."""

import builtins
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

from mdeq_mm.models import NeuralODEBackbone
from mdeq_mm.models.neural_ode import ConvODEFunction

from ..checks import assert_finite, assert_nonzero, grads

torchdiffeq = pytest.importorskip('torchdiffeq')

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('augment', [0, 4])
def test_a_constant_field_moves_the_state_by_the_constant(augment):
    """dz/dt = c has z(1) = z(0) + c, and z(0) is the image and zeros."""
    backbone = NeuralODEBackbone(hidden_channels=8, augment_channels=augment)
    torch.nn.init.zeros_(backbone.function.conv3.weight)
    image = torch.rand(2, 3, 5, 7)
    (out,) = backbone(image)
    assert out.shape == (2, 3 + augment, 5, 7)
    moved = out - backbone.function.conv3.bias[:, None, None]
    torch.testing.assert_close(moved[:, :3], image)
    torch.testing.assert_close(moved[:, 3:], torch.zeros(2, augment, 5, 7))


def test_the_field_depends_on_time():
    """dz/dt = t, the weight of the last layer's time channel being one: z(1) = z(0) + 1/2."""
    backbone = NeuralODEBackbone(hidden_channels=8)
    torch.nn.init.zeros_(backbone.function.conv3.weight)
    torch.nn.init.zeros_(backbone.function.conv3.bias)
    with torch.no_grad():
        backbone.function.conv3.weight[:, -1] = 1
    image = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(backbone(image)[0], image + 0.5)


def test_the_field_is_three_convolutions_with_two_rectifiers():
    torch.manual_seed(0)
    field, t, z = ConvODEFunction(3, 6), torch.tensor(0.7), torch.randn(2, 3, 4, 5)
    time = torch.full((2, 1, 4, 5), 0.7)
    out = z
    for conv, act in ((field.conv1, F.relu), (field.conv2, F.relu), (field.conv3, lambda h: h)):
        weights = dict(weight=conv.weight, bias=conv.bias, padding=conv.weight.shape[-1] // 2)
        out = act(F.conv2d(torch.cat([out, time], dim=1), **weights))
    torch.testing.assert_close(field(t, z), out)


def test_adjoint_gradient_is_that_of_a_differentiated_integrator():
    torch.manual_seed(0)
    backbone = NeuralODEBackbone(hidden_channels=16, augment_channels=2, tol=1e-4).double()
    image = torch.rand(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    leaves = [image, *backbone.parameters()]
    weights = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    adjoint = torch.autograd.grad((backbone(image)[0] * weights).sum(), leaves)

    z0 = torch.cat([image, torch.zeros(2, 2, 6, 6, dtype=torch.float64)], dim=1)
    times = torch.linspace(0, 1, 41, dtype=torch.float64)
    path = torchdiffeq.odeint(backbone.function, z0, times, method='rk4')
    unrolled = torch.autograd.grad((path[-1] * weights).sum(), leaves)
    stepped = NeuralODEBackbone(hidden_channels=16, augment_channels=2, steps=40).double()
    stepped.load_state_dict(backbone.state_dict())
    leaves = [image, *stepped.parameters()]
    through_steps = torch.autograd.grad((stepped(image)[0] * weights).sum(), leaves)
    torch.testing.assert_close(through_steps, unrolled)
    for a, u in zip(adjoint, unrolled, strict=True):
        # ReLU's slope jumps, which costs a fixed step its order.
        assert torch.linalg.vector_norm(a - u) < 2e-2 * torch.linalg.vector_norm(u)


@pytest.mark.parametrize('steps', [1, 2, 4])
def test_fixed_steps_are_of_fourth_order(steps):
    """dz/dt = z: a step of length h multiplies by the first five terms of exp(h)."""
    backbone = NeuralODEBackbone(hidden_channels=8, steps=steps).double()
    backbone.function = ZIsItsOwnRate()
    image = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    (out,) = backbone(image)
    h = 1 / steps
    growth = (1 + h + h**2 / 2 + h**3 / 6 + h**4 / 24) ** steps
    torch.testing.assert_close(out, growth * image)
    (grad,) = torch.autograd.grad(out.sum(), image)
    torch.testing.assert_close(grad, torch.full_like(image, growth))


class ZIsItsOwnRate(torch.nn.Module):
    def forward(self, t, z):
        return z


@pytest.mark.parametrize('name', ['node_cifar10', 'anode_cifar10'])
def test_configs_have_the_papers_size_and_take_a_training_step(name):
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    init_default_scope('mmpretrain')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(172_000, rel=0.01)

    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(i) for i in range(2)]
    loss = model(torch.randn(2, 3, 32, 32), samples, mode='loss')['loss']
    loss.backward()
    assert_finite(dict(loss=loss, **grads(model)))
    assert_nonzero(grads(model))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(augment_channels=-1), 'augment_channels must be an integer >= 0, got -1'),
        (dict(tol=0), 'tol must be a number'),
        (dict(augmented_channels=3), "Did you mean 'augment_channels'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        NeuralODEBackbone(**options)


def test_without_torchdiffeq_the_error_names_the_remedy(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == 'torchdiffeq':
            raise ModuleNotFoundError(f'No module named {name!r}')
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match='pip install torchdiffeq'):
        NeuralODEBackbone()
