"""Official weights give official values: f, equilibria, logits, losses, gradients, accuracy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mdeq_mm  # noqa: F401
from mdeq_mm.deq.gradients import Gradient
from mdeq_mm.deq.solvers import FixedPointIteration, LimitedMemoryBroyden, solve
from mdeq_mm.registry import build_part
from tools.model_converters import mdeq_to_mm as converter

from ..checks import assert_finite
from .official import (
    ROOT,
    OfficialNet,
    backbone_cfg,
    build_classifier,
    build_segmentor,
    random_checkpoint,
)

SHARED = ROOT.parent / 'shared'
DIGITS = SHARED / 'reference' / 'mdeq_tiny_digits.pkl'
DIGITS_EXPECTED = SHARED / 'reference' / 'mdeq_tiny_digits_expected.pth'
CAMVID = SHARED / 'reference' / 'mdeq_camvid.pkl'
CAMVID_IMAGES = SHARED / 'data' / 'camvid' / 'images' / 'val'

# Tight beside the tolerances below, and loose beside rounding in float64.
TIGHT = (
    dict(type='FixedPointIteration', max_iter=400, tol=1e-11),
    dict(type='LimitedMemoryBroyden', max_iter=400, tol=1e-12, memory=10),
    dict(type='Anderson', max_iter=400, tol=1e-12, memory=5),
)
TIGHT_IDS = [cfg['type'] for cfg in TIGHT]


def needs(*paths):
    absent = [path.name for path in paths if not path.exists()]
    return pytest.mark.skipif(bool(absent), reason=f'not here: {absent}')


def relative(got, want):
    return float((got - want).norm() / want.norm())


def feature(model, image):
    with torch.no_grad():
        return model.backbone.injection(model.backbone.stem(image))


def compare_gradients(model, wanted, tolerance):
    """Every parameter's gradient against ``wanted``, by official name."""
    parameters = dict(model.named_parameters())
    for name, want in wanted.items():
        got = parameters.pop(converter.mm_name(name)).grad
        want = want.to(got)
        assert relative(got, want) < tolerance, name
        assert float(F.cosine_similarity(got.flatten(), want.flatten(), dim=0)) > 0.9999, name
    assert not parameters, 'parameters without a value to compare'


# ---- weights written here, in official names: always run --------------------------------------


def written_case(task):
    """State dict with trainable leaves, official network, model here, image, label."""
    segmentation = task == 'segmentation'
    channels = (8, 8, 16, 24) if segmentation else (8, 16)
    strides = (2, 2) if segmentation else (1, 1)
    state = random_checkpoint(
        channels, head_channels=(4, 6), injection=segmentation, segmentation=segmentation
    )
    for name, value in state.items():
        if value.is_floating_point() and 'running' not in name:
            value.requires_grad_()
    net = OfficialNet(state, channels, 4, strides)
    gen = torch.Generator().manual_seed(1)
    size = (64, 96) if segmentation else (16, 16)
    image = torch.randn(2, 3, *size, generator=gen, dtype=torch.float64)
    label = (2, 16, 24) if segmentation else (2,)
    label = torch.randint(5, label, generator=gen)

    def build(solver):
        cfg = backbone_cfg(channels, 2, strides, 4, solver)
        model = build_segmentor(cfg, 5) if segmentation else build_classifier(cfg, (4, 6), 20, 5)
        model = model.double()
        model.load_state_dict(converter.convert(state)[0], strict=True)
        return model

    return state, net, build, image, label


@pytest.mark.parametrize('task', ['classification', 'segmentation'])
def test_written_weights_equilibrium_logits_and_gradients(task):
    state, net, build, image, label = written_case(task)
    # f contracts so well that 60 steps are exact to rounding, and backpropagation through them.
    z = net.iterate(image, 60)
    again = net.f(z, net.inject(image))
    assert max(relative(a, b) for a, b in zip(again, z)) < 1e-14
    logits = net.logits(z)
    loss = F.cross_entropy(logits, label)
    names = [name for name, value in state.items() if value.requires_grad]
    # A bias before a batch norm in evaluation mode has its place in the running mean.
    names = [name for name in names if name != 'last_layer.0.bias']
    grads = torch.autograd.grad(loss, [state[name] for name in names])

    for solver in TIGHT:
        model = build(solver)
        features = model.backbone(image)
        for got, want in zip(features, z):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        got = model(image, mode='tensor')
        torch.testing.assert_close(got, logits, rtol=1e-10, atol=1e-10)
        F.cross_entropy(got, label).backward()
        compare_gradients(model, dict(zip(names, grads)), 1e-8)


def test_written_weights_gradient_differs_from_the_one_that_ignores_the_equilibrium():
    """The comparison above sees the implicit term: without it the gradients are far off."""
    state, net, build, image, label = written_case('classification')
    grads = []
    name = 'fullstage.branches.0.blocks.0.conv1.weight_v'
    for steps in (60, 1):
        with torch.no_grad():
            z = net.iterate(image, 60 - steps)
        x = net.inject(image)
        for _ in range(steps):
            z = net.f(z, x)
        loss = F.cross_entropy(net.logits(z), label)
        grads.append(torch.autograd.grad(loss, state[name])[0])
    assert relative(grads[1], grads[0]) > 1e-2


# ---- the digits checkpoint ----------------------------------------------------------------------


def digits_model(solver):
    model = build_classifier(backbone_cfg((24, 24), 5, (1, 1), 8, solver), (8, 16), 200, 10)
    converted, _ = converter.convert(converter.load_official(DIGITS))
    model.load_state_dict(converted, strict=True)
    return model


@needs(DIGITS, DIGITS_EXPECTED)
@pytest.mark.parametrize('solver', TIGHT, ids=TIGHT_IDS)
def test_digits_values_and_gradients(solver):
    want = torch.load(DIGITS_EXPECTED, weights_only=True)
    model = digits_model(solver).double()
    image = want['image'].double()
    injection = feature(model, image)
    for z, f_of_z in (
        ([torch.zeros_like(a) for a in want['z_random']], want['f_of_zero']),
        (want['z_random'], want['f_of_z_random']),
    ):
        with torch.no_grad():
            got = model.backbone.cell([a.double() for a in z], injection)
        for a, b in zip(got, f_of_z):
            assert relative(a, b.double()) < 1e-6

    features = model.backbone(image)
    for a, b in zip(features, want['z_star']):
        assert relative(a, b.double()) < 1e-6
    logits = model(image, mode='tensor')
    assert relative(logits, want['logits'].double()) < 1e-6
    loss = F.cross_entropy(logits, want['label'])
    assert float(loss) == pytest.approx(float(want['loss']), rel=1e-5)
    loss.backward()
    compare_gradients(model, want['grads'], 1e-5)


def digits_test_rows():
    datasets = pytest.importorskip('sklearn.datasets')
    data = datasets.load_digits()
    rows = np.arange(len(data.target)) % 5 == 0
    images = torch.from_numpy(data.images[rows]).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(16, 16), mode='bilinear', align_corners=False)
    return ((images - 0.3) / 0.35).expand(-1, 3, -1, -1), torch.from_numpy(data.target[rows])


@needs(DIGITS)
@pytest.mark.parametrize(
    'solver',
    [
        dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3),
        dict(type='FixedPointIteration', max_iter=20, tol=1e-3),
    ],
    ids=['defaults', 'FixedPointIteration'],
)
def test_digits_accuracy_in_single_precision(solver):
    images, labels = digits_test_rows()
    model = digits_model(solver)
    with torch.no_grad():
        predicted = torch.cat([model(a, mode='tensor').argmax(1) for a in images.split(120)])
    assert len(labels) == 360
    assert int((predicted == labels).sum()) == 356  # 98.9%


def digits_gradient(gradient, solver):
    """Gradient of f's weights on eight images, as one vector."""
    images, labels = digits_test_rows()
    model = digits_model(solver).double()
    if gradient is not None:
        model.backbone.implicit.gradient = build_part(gradient, Gradient)
    logits = model(images[:8].double(), mode='tensor')
    F.cross_entropy(logits, labels[:8]).backward()
    return torch.cat([p.grad.flatten() for p in model.backbone.cell.parameters()])


@needs(DIGITS)
def test_digits_gradients_beside_the_exact_one():
    exact = digits_gradient(None, TIGHT[1])
    solver = dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3)

    def cosine(gradient):
        got = digits_gradient(gradient, solver)
        return float(F.cosine_similarity(got, exact, dim=0))

    assert cosine(None) > 0.999
    truncated = [cosine(dict(type='TruncatedGradient', steps=k, damping=1)) for k in (1, 5, 10)]
    assert truncated == sorted(truncated) and truncated[0] > 0.8 and truncated[-1] > 0.98
    shared = [cosine(dict(type='SharedInverseGradient', steps=k)) for k in (0, 5)]
    assert shared[0] > 0.6 and shared[1] > truncated[1]
    phantom = [cosine(dict(type='PhantomGradient', steps=k)) for k in (5, 10)]
    assert phantom == sorted(phantom) and phantom[0] > 0.85
    # The comparison sees the bias of the cheapest.
    assert 0.6 < cosine(dict(type='JacobianFreeGradient')) < truncated[0]


# ---- the CamVid checkpoint, where plain iteration does not converge ----------------------------


def camvid_model():
    cfg = backbone_cfg(
        (16, 32, 64, 128), 2, (2, 2), 8, dict(type='LimitedMemoryBroyden', max_iter=26, tol=1e-3)
    )
    model = build_segmentor(cfg, 19)
    converted, report = converter.convert(converter.load_official(CAMVID))
    model.load_state_dict(converted, strict=True)
    assert report.folded == 1
    return model


def camvid_function():
    """f, flat, of one normalized crop at twice the training scale, its zero state, the model."""
    image_module = pytest.importorskip('PIL.Image')
    image = image_module.open(sorted(CAMVID_IMAGES.iterdir())[8]).convert('RGB')
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    pixels = ((pixels - 110) / 75)[:, :, 10:170, 8:232]
    model = camvid_model().eval()
    with torch.no_grad():
        problem = model.backbone.problem(pixels)
    return problem, problem.start, model, pixels


@needs(CAMVID)
def test_camvid_loads_strictly_and_matches_the_official_network():
    model = camvid_model().double()
    state = {
        key: value.double() if value.is_floating_point() else value
        for key, value in converter.load_official(CAMVID).items()
    }
    net = OfficialNet(state, (16, 32, 64, 128), 8, (2, 2))
    gen = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 64, 96, generator=gen, dtype=torch.float64)
    injection = feature(model, image)
    with torch.no_grad():
        torch.testing.assert_close(injection, net.inject(image), rtol=1e-10, atol=1e-10)
        z = [torch.randn(a.shape, generator=gen, dtype=a.dtype) for a in net.zeros(injection)]
        got, want = model.backbone.cell(z, injection), net.f(z, injection)
        torch.testing.assert_close(list(got), want, rtol=1e-10, atol=1e-10)
        logits = model.decode_head(tuple(z))
    assert logits.shape[1] == 19
    # The folded running mean is stored in single precision.
    torch.testing.assert_close(logits, net.logits(z), rtol=1e-5, atol=1e-5)


@needs(CAMVID, CAMVID_IMAGES)
def test_camvid_broyden_with_ten_pairs_converges_where_plain_iteration_stalls():
    f, z0, model, pixels = camvid_function()
    with torch.no_grad():
        assert_finite(model(pixels, mode='tensor'))
    plain = solve(f, z0, FixedPointIteration(max_iter=60, tol=0))
    short = solve(f, z0, LimitedMemoryBroyden(max_iter=60, tol=0, memory=10))
    assert float(plain.residual) > 1e-2
    assert float(short.residual) < 1e-5
    # Nor does it leave again: dropping the oldest pairs does no harm.
    assert float(short.trace.max()) < 10
    assert float(short.trace[-1]) < 1e-5
