"""Use of a model by a framework: copy, average, save, checkpoint, compile, export, repeat."""

import copy
import ctypes
import gc
import io
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.runner import Runner
from torch.export import Dim
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from mdeq_mm.registry import build_implicit

from ..checks import OLD_TORCH, assert_nonzero, assert_same, grads
from . import SOLVERS, contracting, tiny_backbone


def image(n=2, seed=1):
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def loss_of(outs):
    """Weights of no symmetry: norms make sums and squares of a map nearly constant."""
    return sum(
        (out * torch.linspace(-1, 1, out[0].numel()).view(out[0].shape)).sum() for out in outs
    )


def gradients(net, x, seed=0):
    torch.manual_seed(seed)
    return torch.autograd.grad(loss_of(net(x)), [p for p in net.parameters() if p.requires_grad])


def plain_weights(net):
    """Fold the weight normalization into plain weights, for deployment."""
    for module in net.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, 'weight')
    return net


class Segmentor(BaseModel):
    """The smallest model that a Runner trains."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs, mode='tensor'):
        return dict(loss=loss_of(self.backbone(torch.stack(inputs))))


def run(tmp_path, model, max_iters=2, **options):
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=2,
            dataset=[dict(inputs=x) for x in image(4)],
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=1e-3), **options.pop('optim_wrapper', dict())
        ),
        default_scope='mmengine',
        experiment_name=f'robustness_{tmp_path.parent.name}_{tmp_path.name}',
        log_level='ERROR',
        **options,
    )
    runner.train()
    return runner


def test_a_copy_made_with_a_graph_alive_is_independent():
    net = tiny_backbone(drop_rate=0.3, norm_eval=True)
    outs = net(image())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    loss_of(outs).backward()
    assert [name for name, grad in grads(twin).items() if grad is not None] == []
    assert_nonzero(net.cell.fusions[0].norm.weight.grad)


def test_moving_average_is_the_mean_of_the_weights():
    net = tiny_backbone(norm_eval=True)
    average = ExponentialMovingAverage(net, momentum=0.25)
    average.update_parameters(net)
    start = {k: v.clone() for k, v in net.named_parameters()}
    loss_of(net(image())).backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.sub_(0.1 * parameter.grad)
    average.update_parameters(net)
    for name, parameter in net.named_parameters():
        expected = 0.75 * start[name] + 0.25 * parameter
        torch.testing.assert_close(average.module.get_parameter(name), expected)
    assert not torch.equal(average.module(image())[0], net(image())[0])


def test_ema_and_checkpoint_hooks_save_both_sets_of_weights(tmp_path):
    model = Segmentor(tiny_backbone(norm_eval=True, drop_rate=0.2))
    ema = EMAHook(momentum=0.5)
    keep = dict(type='CheckpointHook', interval=1, by_epoch=False, max_keep_ckpts=1)
    options = dict(custom_hooks=[ema], default_hooks=dict(checkpoint=keep))
    runner = run(tmp_path, model, max_iters=3, **options)
    assert [p.name for p in sorted(tmp_path.glob('*.pth'))] == ['iter_3.pth']
    saved = torch.load(tmp_path / 'iter_3.pth', weights_only=False)
    weights, average = saved['state_dict'], saved['ema_state_dict']
    assert {f'module.{k}' for k in weights} <= set(average)
    # As MM has it: what evaluation uses, the average, is called state_dict.
    key = 'backbone.cell.blocks.0.conv1.parametrizations.weight.original1'
    assert not torch.equal(weights[key], average[f'module.{key}'])
    fresh = Segmentor(tiny_backbone(drop_rate=0.2)).eval()
    fresh.load_state_dict(weights)
    runner.model.eval()
    ema._swap_ema_parameters()
    for a, b in zip(fresh.backbone(image()), runner.model.backbone(image())):
        assert_same(a, b)


def test_the_whole_model_is_saved_with_plain_weights():
    """torch refuses to pickle parametrized modules; the same net without weight norm is plain."""
    net = tiny_backbone(drop_rate=0.3).eval()
    with pytest.raises(RuntimeError, match=r'only supported through state_dict'):
        torch.save(net, io.BytesIO())
    plain = tiny_backbone(drop_rate=0.3, weight_norm=False).eval()
    # Not a deepcopy: it shares the class that torch made, and takes the weight off it for both.
    donor = tiny_backbone(drop_rate=0.3)
    donor.load_state_dict(net.state_dict())
    plain.load_state_dict(plain_weights(donor).state_dict())
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_same(again(image()), net(image()))


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_activation_checkpointing_recomputes_the_same_masks(use_reentrant):
    net = tiny_backbone(drop_rate=0.4, norm_eval=True)

    def checkpointed(x):
        return checkpoint(net, x, use_reentrant=use_reentrant)

    def grads(call):
        net.zero_grad()
        x = image().requires_grad_()
        torch.manual_seed(3)
        outs = call(x)
        # A draw between forward and backward must not change the masks.
        torch.rand(7)
        loss_of(outs).backward()
        return [x.grad, *(p.grad.clone() for p in net.parameters())]

    expected, got = grads(net), grads(checkpointed)
    assert any(g.any() for g in expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)
    # The masks matter: other masks give another gradient.
    torch.manual_seed(4)
    other = torch.autograd.grad(loss_of(net(image())), list(net.parameters()))
    assert not torch.allclose(other[0], expected[1])


def test_gradients_accumulate_over_steps(tmp_path):
    """Two batches of two with accumulation give the step of their summed gradients."""
    model = Segmentor(tiny_backbone(norm_eval=True))
    # A Runner would draw other weights than these once more.
    model.init_weights()
    reference = copy.deepcopy(model)
    halves = image(4).split(2)
    total = [
        sum(pair) / 2 for pair in zip(*(gradients(reference.backbone, half) for half in halves))
    ]
    run(tmp_path, model, optim_wrapper=dict(accumulative_counts=2))
    for old, grad, new in zip(reference.parameters(), total, model.parameters()):
        torch.testing.assert_close(new, old - 1e-3 * grad)


def test_a_frozen_backbone_builds_no_graph_unless_the_input_wants_one():
    net = tiny_backbone(frozen_stages=2).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert [out.requires_grad for out in net(image())] == [False] * 2
    x = image().requires_grad_()
    loss_of(net(x)).backward()
    assert_nonzero(x.grad)
    assert [name for name, grad in grads(net).items() if grad is not None] == []
    assert_same(dict(net.state_dict()), dict(before))


def test_a_head_trains_on_a_frozen_backbone():
    net = tiny_backbone(frozen_stages=2).train()
    head = torch.nn.Conv2d(8, 2, 1)
    head(net(image())[0]).square().sum().backward()
    assert head.weight.grad.any() and net.implicit.backward_stats is None


@pytest.mark.parametrize('kind', SOLVERS)
def test_gradient_to_the_input_in_evaluation_is_the_directional_derivative(kind):
    """Through the smooth net in double precision, where a finite difference is accurate."""
    net = tiny_backbone(kind, max_iter=200, tol=1e-11).double().eval()
    net.cell.smooth = True
    with torch.no_grad():
        for fusion in net.cell.fusions:
            fusion.norm.weight.mul_(0.05)
        net.cell.blocks[0].conv2.parametrizations.weight.original0.fill_(0.02)
    x = image(1).double().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(net(x)), x)
    assert [name for name, grad in grads(net).items() if grad is not None] == []
    direction, step = torch.randn_like(x), 1e-5
    with torch.no_grad():
        ahead, behind = (loss_of(net(x + sign * step * direction)) for sign in (1, -1))
    assert net.implicit.forward_stats.summary()['converged'] == 1
    torch.testing.assert_close(
        (grad * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-6
    )


def test_several_models_in_one_process_do_not_meet():
    """Forwards and backwards of two nets, interleaved, give what each gives alone."""
    options = [dict(kind='Anderson'), dict(kind='LimitedMemoryBroyden', channels=(8,), max_iter=7)]
    expected = [gradients(tiny_backbone(norm_eval=True, **o), image()) for o in options]
    nets = [tiny_backbone(norm_eval=True, **o) for o in options]
    losses = [loss_of(net(image())) for net in nets]
    for index in (1, 0):
        got = torch.autograd.grad(losses[index], list(nets[index].parameters()))
        for a, b in zip(got, expected[index]):
            torch.testing.assert_close(a, b)


def test_one_model_feeds_another():
    """The gradient of the first passes the second: two hooks in one backward."""
    first, second = tiny_backbone(norm_eval=True), tiny_backbone(in_channels=8, norm_eval=True)
    loss_of(second(first(image())[0])).backward()
    for net in (first, second):
        assert net.implicit.backward_stats is not None
        assert net.cell.blocks[0].norm1.weight.grad.any()


def test_two_live_forwards_of_one_model_have_their_own_gradients():
    net = tiny_backbone(norm_eval=True)
    expected = [gradients(net, image(seed=s)) for s in (1, 2)]
    losses = [loss_of(net(image(seed=s))) for s in (1, 2)]
    for index in (1, 0):
        for a, b in zip(
            torch.autograd.grad(losses[index], list(net.parameters())), expected[index]
        ):
            torch.testing.assert_close(a, b)


def test_a_second_backward_is_refused_by_torch_or_repeats_the_first():
    net = tiny_backbone(norm_eval=True)
    parameters = list(net.parameters())
    loss = loss_of(net(image()))
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, parameters), first):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match='second time'):
        torch.autograd.grad(loss, parameters)


def test_double_backward_of_the_backbone_is_one_clear_error():
    x = image().requires_grad_()
    with pytest.raises(NotImplementedError, match='create_graph.*unrolled_layers'):
        torch.autograd.grad(loss_of(tiny_backbone().eval()(x)), x, create_graph=True)


def test_double_backward_works_where_the_error_sends_the_user():
    x = image(1).double().requires_grad_()
    net = tiny_backbone(unrolled_layers=2).double().eval()
    (grad,) = torch.autograd.grad(loss_of(net(x)), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert torch.isfinite(second).all() and second.any()


class HeapInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ('arena', 'ordblks', 'smblks', 'hblks', 'hblkhd')
        + ('usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost')
    ]


def memory():
    """Bytes in use, and by how much they may differ for reasons other than a leak.

    glibc counts what is allocated, torch's tensors included. Elsewhere it is the peak of the
    resident memory, which grows by pages.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallinfo2'):
        libc.mallinfo2.restype = HeapInfo
        info = libc.mallinfo2()
        return info.uordblks + info.hblkhd, 100_000
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, 4_000_000


def tensors():
    gc.collect()
    # By type: isinstance asks each object for its class, and some answer with a warning.
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_memory_does_not_grow_over_500_iterations():
    """Training steps with failures and evaluations between them, after a warm-up of 80.

    A leaked graph would be 45 kB an iteration, a leaked state of a solve 1 kB.
    """
    solver = dict(type='LimitedMemoryBroyden', max_iter=3, memory=3)
    gradient = dict(type='ImplicitGradient', solver=solver)
    net = tiny_backbone('Anderson', max_iter=3, channels=(4,), drop_rate=0.2, gradient=gradient)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step(index):
        x = image()
        if index % 7 == 0:
            x[0] = float('nan')
        optimizer.zero_grad()
        loss = loss_of(net(x))
        if index % 3:
            loss.backward()
            if index % 7:
                optimizer.step()
        if index % 5 == 0:
            with torch.no_grad():
                net.eval()(image(1))
            net.train()

    for index in range(1, 501):
        step(index)
        # The same point in the cycle of steps.
        if index == 80:
            count, (bytes_in_use, tolerance) = tensors(), memory()
    assert tensors() == count > 0
    assert memory()[0] - bytes_in_use < tolerance


def test_nothing_of_a_failed_call_is_left_behind():
    """An exception inside f ends the caching of weights: the next call sees new ones."""
    net = tiny_backbone(norm_eval=True)
    net(image())
    handle = net.cell.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(image())
    handle.remove()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    twin = tiny_backbone(norm_eval=True)
    twin.load_state_dict(net.state_dict())
    assert_same(net(image()), twin(image()))


def test_compiled_model_has_the_same_values_and_gradients():
    net = tiny_backbone(channels=(4,), max_iter=3, norm_eval=True)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend='eager')
    for a, b in zip(compiled(image()), net(image())):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(compiled, image()), gradients(net, image())):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize('drop_rate', [0.0, 0.3])
def test_compiled_cell_trains_as_the_cell_does(drop_rate):
    """Its backward pass runs once for every vjp of the adjoint solver, as a copy's does."""
    options = dict(channels=(4,), max_iter=5, norm_eval=True, drop_rate=drop_rate)
    plain = tiny_backbone(**options)
    compiled = tiny_backbone(compile_cell=dict(backend='aot_eager'), **options)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters['stats']
    for net in (compiled, copy.deepcopy(compiled)):
        for a, b in zip(gradients(net, image()), gradients(plain, image()), strict=True):
            # torch 2.9 rounds what it traced otherwise.
            near = dict(rtol=1e-4, atol=1e-4) if OLD_TORCH else {}
            torch.testing.assert_close(a, b, **near)
        # One for the solve, one for the call that keeps its graph, and one that makes the masks;
        # torch 2.9 makes twice as many.
        made = graphs['unique_graphs']
        assert 0 < made <= (6 if OLD_TORCH else 3)
        gradients(net, image(seed=2))
        assert graphs['unique_graphs'] == made
    torch._dynamo.reset()


def test_compile_cell_is_checked():
    with pytest.raises(ValueError, match="options of torch.compile, got 'yes'"):
        tiny_backbone(compile_cell='yes')


# One traced, then others: another batch, one image, other sizes, odd ones among them.
EXPORTED = (2, 3, 16, 16)
SHAPES = (EXPORTED, (5, 3, 16, 16), (1, 3, 16, 16), (3, 3, 24, 12), (2, 3, 17, 23))
DYNAMIC = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


def check_export(net, run):
    """Compare ``run``, the result of an export, with the net on images of all SHAPES.

    Returns:
        list[bool]: Whether each image's solve ended before the budget.
    """
    stopped = []
    for seed, shape in enumerate(SHAPES):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for got, wanted in zip(run(x), net(x), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        stopped += (net.implicit.forward_stats.num_iter < net.implicit.solver.max_iter).tolist()
    return stopped


@torch.no_grad()
@pytest.mark.parametrize('kind', SOLVERS)
def test_export_for_any_batch_and_size(kind):
    # Some images reach the tolerance before the budget is spent, which the graph always spends:
    # its masks do what a stop does.
    net = contracting(tiny_backbone(kind, max_iter=4, tol=0.0155)).eval()
    program = torch.export.export(net, (torch.randn(EXPORTED),), dynamic_shapes=(DYNAMIC,))
    stopped = check_export(net, program.module())
    assert any(stopped) and not all(stopped)


@torch.no_grad()
@pytest.mark.parametrize('kind', SOLVERS)
def test_onnx_export_for_any_batch_and_size(kind, tmp_path):
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    net = tiny_backbone(kind, max_iter=3, tol=0.5, channels=(8,)).eval()
    net.cell.fusions[0].norm.weight.fill_(0.1)
    path = str(tmp_path / 'mdeq.onnx')
    torch.onnx.export(
        net, (torch.randn(EXPORTED),), path, dynamic_shapes=(DYNAMIC,), dynamo=True, verbose=False
    )
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name

    def run(x):
        return [torch.from_numpy(out) for out in session.run(None, {name: x.numpy()})]

    assert any(check_export(net, run))


def test_threads_may_predict_with_one_model():
    net = tiny_backbone().eval()
    images = [image(seed=s) for s in range(8)]
    with torch.no_grad():
        expected = [net(x)[0] for x in images]

    def predict(x):
        with torch.no_grad():
            return net(x)[0]

    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(predict, images), expected):
            torch.testing.assert_close(got, wanted)


def test_an_implicit_layer_without_parameters_passes_no_gradient_and_no_error():
    solver = dict(type='Anderson', max_iter=30, tol=1e-6)
    layer = build_implicit(solver, dict(type='ImplicitGradient', solver=solver))
    out = layer(torch.cos, torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(out, torch.cos(out), rtol=1e-5, atol=1e-5)
