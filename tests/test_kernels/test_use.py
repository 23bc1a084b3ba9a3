"""Operations in use: with and without gradients, compilers, exports, threads, memory."""

import copy
import functools
import importlib
import logging
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mdeq_mm.kernels import (
    KERNELS,
    Norm,
    Term,
    backends,
    compiled,
    extension,
    norm_relu,
    residual_norms,
    resolve,
    sum_rectify,
)
from mdeq_mm.layers import MDEQGroupNorm

from ..checks import OLD_TORCH, assert_same, needs_fake_cuda
from .cases import (
    NormRelu,
    NormReluConv,
    Residual,
    Sum,
    differentiable,
    mapped,
    maps,
    results,
    tensors,
)

EVERY = [NormRelu, Residual, Sum]


@pytest.mark.parametrize('kind', [*EVERY, NormReluConv])
def test_parameters_that_are_frozen_cost_and_get_nothing(cpp, kind, monkeypatch):
    asked = []

    class Spy:
        def __getattr__(self, name):
            operation = getattr(torch.ops.mdeq_mm, name)

            def call(*args):
                if name.endswith('backward'):
                    asked.append([a for a in args if isinstance(a, bool)])
                return operation(*args)

            return call

    monkeypatch.setattr(backends, 'operations', lambda kernel: Spy())
    case = kind.random(2, 4, 3, 3, 2)
    for frozen in (False, True):
        live = differentiable(case)
        if frozen:
            live = mapped(live, lambda t: t.detach() if t.dim() == 1 else t)
        live.computed(cpp).sum().backward()
        parameters = [t for t in tensors(live) if t.dim() == 1]
        assert [p.grad is None for p in parameters] == [frozen] * len(parameters)
        assert [t.shape for t in tensors(live) if t.dim() == 4 and t.grad is None] == []
    # The last flags of a backward pass say whether those of scales and shifts are wanted.
    assert asked[0][-1] is True and asked[1][-1] is False


@pytest.mark.parametrize('kind', [*EVERY, NormReluConv])
def test_a_graph_may_be_walked_as_often_as_the_adjoint_solver_likes(kernel, kind):
    case = differentiable(kind.random(2, 4, 3, 3, 2))
    first = tensors(case)[0]
    y = case.computed(kernel)
    v = torch.randn_like(y)
    grads = [torch.autograd.grad(y, first, v, retain_graph=True)[0] for _ in range(3)]
    assert_same(grads[0], grads[1], 'second')
    assert_same(grads[0], grads[2], 'third')
    case.computed(kernel).backward(v)
    torch.testing.assert_close(first.grad, grads[0])


def test_a_gradient_ends_at_the_inputs_when_it_is_differentiated_again(kernel):
    """Even where one of them was computed from another, as a state is from the weights."""
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    x = maps(2, 4, 3, 3)
    if OLD_TORCH:
        # 2.9 crashes where a channels-last norm needs its weight's gradient alone.
        x = x.contiguous()

    def f(weight, twice):
        inner = norm_relu(x, Norm(2, weight), kernel=kernel)
        y = norm_relu(inner, Norm(1, weight), kernel=kernel)
        (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=twice)
        return grad

    torch.testing.assert_close(f(weight, True), f(weight, False))


@pytest.mark.parametrize('kind', [*EVERY, NormReluConv])
def test_nothing_is_kept_but_inputs_result_and_moments(cpp, kind):
    case = differentiable(kind.random(2, 8, 6, 6, 4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = case.computed(cpp)
    known = {t.data_ptr() for t in [*tensors(case), y]}
    others = [t for t in saved if t.data_ptr() not in known]
    # Two numbers for each group of each image; the mask.
    assert 0 < sum(t.numel() for t in others) <= 2 * 2 * 8 * 3


def test_a_backward_pass_computes_the_gradients_it_is_asked_for(cpp, monkeypatch):
    """The adjoint solver needs the gradient of the map only, not that of the weight."""
    case = differentiable(NormReluConv.random(2, 4, 5, 5, 2))
    y, computed = case.computed(cpp), []
    module = importlib.import_module('mdeq_mm.kernels.norm_relu_conv')
    gradient = module._conv_gradient
    counted = lambda *args: computed.append(args[-1]) or gradient(*args)  # noqa: E731
    monkeypatch.setattr(module, '_conv_gradient', counted)
    v = torch.randn_like(y)
    for wanted, which in (
        ([case.x], [0]),
        ([case.weight], [0, 1]),
        ([case.x, case.weight], [0, 1]),
    ):
        computed.clear()
        torch.autograd.grad(y, wanted, v, retain_graph=True)
        assert computed == which
    y = replace(case, x=case.x.detach(), norm=Norm(2)).computed(cpp)
    computed.clear()
    torch.autograd.grad(y, case.weight, v)
    assert computed == [1]


def test_the_gradient_of_one_pass_is_not_that_of_another(cpp):
    """A pass without the weight's gradient leaves nothing behind for one that needs it."""
    case = differentiable(NormReluConv.random(2, 4, 5, 5, 2))
    y = case.computed(cpp)
    first, second = torch.randn_like(y), torch.randn_like(y)
    torch.autograd.grad(y, case.x, first, retain_graph=True)
    expected = torch.autograd.grad(case.defined(), case.weight, second)
    for twice in (False, True):
        got = torch.autograd.grad(y, case.weight, second, retain_graph=True, create_graph=twice)
        torch.testing.assert_close(got, expected)


def test_a_graph_is_freed_whatever_was_asked_of_it(cpp):
    """Also where the gradient of the weight was not: nothing holds the graph but its result."""
    case = differentiable(NormReluConv.random(2, 4, 5, 5, 2))
    # As of a state, and of a parametrized weight, which has a graph of its own.
    inner, weight = case.x * 1.0, case.weight * 1.0
    y = replace(case, x=inner, weight=weight).computed(cpp)
    torch.autograd.grad(y.sum(), case.x)
    kept = weakref.ref(inner)
    del inner, weight, y
    assert kept() is None


def test_memory_that_nobody_needs_is_used_again(cpp):
    x = maps(2, 4, 5, 5)
    expected = norm_relu(x, Norm(2), kernel=cpp)
    for wanted in (True, False):
        given = x.clone(memory_format=torch.channels_last).requires_grad_(wanted)
        y = norm_relu(given, Norm(2), kernel=cpp, inplace=True)
        assert_same(y, expected)
        assert (y.data_ptr() == given.data_ptr()) != wanted
        assert torch.equal(given, x) == wanted


@pytest.mark.parametrize('kind', EVERY)
def test_to_the_bit_independent_of_batch_and_threads(cpp, kind):
    case = kind.random(5, 24, 40, 41, 8, dtype=torch.float32)
    weights = torch.randn(5, 24, 40, 41)

    def of(rows):
        return mapped(case, lambda t: t[rows] if t.dim() == 4 else t)

    def computed(rows):
        # Gradients of parameters are sums over the batch.
        return [
            r for r in results(of(rows), lambda c: c.computed(cpp), weights[rows]) if r.dim() == 4
        ]

    whole = computed(slice(None))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (slice(0, 5), slice(0, 1), slice(3, 5), slice(1, 5)):
            for a, b in zip(computed(rows), whole, strict=True):
                assert_same(a, b[rows])


@pytest.mark.parametrize('kind', [*EVERY, NormReluConv])
def test_many_threads_at_once(cpp, kind):
    cases = [kind.random(2, 8, 9, 9, 4) for _ in range(8)]
    weights = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    compute = functools.partial(results, compute=lambda c: c.computed(cpp), weights=weights)
    expected = [compute(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(compute, cases), expected):
            assert_same(got, wanted)


def whole(x, z, weight, kernel):
    """All operations in a row, of a map and of one half its size."""
    half = norm_relu(x, Norm(2, weight), kernel=kernel)
    y = residual_norms(half, z, Norm(2, weight), Norm(1), injection=x, kernel=kernel)
    low = y[..., ::2, ::2]
    return sum_rectify(
        y, [Term(low, Norm(2, weight), True), Term(half)], smooth=True, kernel=kernel
    )


class Whole(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)
        self.kernel = kernel

    def forward(self, x):
        return whole(x, 2 * x, self.weight, self.kernel)


def gradients(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def test_compiled_as_part_of_a_model(kernel):
    torch._dynamo.reset()
    module, x = Whole(kernel), torch.randn(2, 4, 6, 6)
    whole_graph = torch.compile(module, fullgraph=True, backend='aot_eager')
    for a, b in zip(gradients(whole_graph, x), gradients(module, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
def test_every_formula_through_the_compiler_of_torch():
    torch._dynamo.reset()
    native, own = Whole('native'), Whole('compiled')
    own.load_state_dict(native.state_dict())
    for n in (2, 3):
        x = torch.randn(n, 4, 6, 6)
        for a, b in zip(gradients(own, x), gradients(native, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_formulas_are_programs_of_their_own(monkeypatch):
    """One graph per kind of call, whatever sizes follow: torch gives up after a number of them."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f: compile_(f, backend='eager', fullgraph=True))
    monkeypatch.setattr(compiled, '_compiled', functools.cache(compiled._compiled.__wrapped__))
    made = torch._dynamo.utils.counters['stats']
    before = made['unique_graphs']
    with torch._dynamo.config.patch(recompile_limit=2):
        for groups in range(1, 4):
            norm = Norm(groups, torch.rand(12 * groups))
            for n in (2, 3, 4):
                x = torch.randn(n, 12 * groups, 5, n)
                y = norm_relu(x, norm, kernel='compiled')
                torch.testing.assert_close(y, norm_relu(x, norm, kernel='native'))
    # The second size of a kind compiles one graph for all sizes.
    assert made['unique_graphs'] - before == 3 * 2
    torch._dynamo.reset()


def test_an_exported_graph_holds_operators_of_torch_alone(kernel):
    module, x = Whole(kernel), torch.randn(2, 4, 6, 6)
    size = {2: torch.export.Dim('h', min=4, max=64), 3: torch.export.Dim('w', min=4, max=64)}
    graph = torch.export.export(module, (x,), dynamic_shapes=(size,))
    targets = {str(node.target) for node in graph.graph.nodes}
    assert any('group_norm' in t for t in targets) and not any('mdeq' in t for t in targets)
    other = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(graph.module()(other), module(other), rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(module, x)
    assert 'mdeq_mm::' not in str(traced.inlined_graph)


def test_shapes_are_told_as_they_are(cpp):
    """torch's own check of an operation: schema, results without values, functional use."""
    x, z, small = (
        maps(2, 6, 5, 4, torch.float32),
        maps(2, 6, 5, 4, torch.float32),
        maps(2, 6, 3, 2, torch.float32),
    )
    weight, mask = torch.rand(6), torch.ones(2, 6)
    ops = torch.ops.mdeq_mm
    affine = (weight, weight, weight, None)
    y, stats = ops.norm_relu(x, weight, None, 3, 1e-5, True)
    _, stats2, stats3 = ops.residual_norms(x, z, z, mask, *affine, 3, 2, 1e-5, 1e-5, False)
    terms = ([small, x, z], [weight, None, None], [weight, None, None])
    total, term_stats = ops.sum_rectify(x, *terms, [2, 3, 0], [1e-5] * 3, False)
    calls = [
        (ops.norm_relu, (x, weight, None, 3, 1e-5, True)),
        (ops.norm_relu_, (x.clone(), weight, None, 3, 1e-5, True)),
        (ops.norm_relu_backward, (x, x, stats, weight, None, 3, True, True)),
        (ops.norm_relu_backward, (x, x, stats, weight, None, 3, True, False)),
        (ops.residual_norms, (x, z, z, mask, *affine, 3, 2, 1e-5, 1e-5, False)),
        (
            ops.residual_norms_backward,
            (x, x, z, z, mask, *affine, stats2, stats3, 3, 2, True, True, False, True),
        ),
        (
            ops.residual_norms_backward,
            (x, x, z, z, None, *affine, stats2, stats3, 3, 2, True, True, True, True),
        ),
        (ops.sum_rectify, (x, *terms, [2, 3, 0], [1e-5] * 3, True)),
        (ops.sum_rectify_backward, (x, total, *terms, term_stats, [2, 3, 0], False, True)),
    ]
    for operation, args in calls:
        torch.library.opcheck(
            operation.default, args, test_utils=('test_schema', 'test_faketensor')
        )


def test_an_operation_refuses_what_would_read_beyond_its_memory(cpp):
    ops, x = torch.ops.mdeq_mm, maps(2, 6, 5, 4, torch.float32)
    with pytest.raises(RuntimeError, match='6 channels do not split into 4 groups'):
        ops.norm_relu(x, None, None, 4, 1e-5, True)
    with pytest.raises(RuntimeError, match='expected 6 values, got 5'):
        ops.norm_relu(x, torch.rand(5), None, 3, 1e-5, True)
    with pytest.raises(RuntimeError, match='expected size'):
        ops.residual_norms(x, x[..., 1:], *[None] * 6, 3, 3, 1e-5, 1e-5, False)
    with pytest.raises(RuntimeError, match='must have one dtype'):
        ops.sum_rectify(x, [x.double()], [None], [None], [0], [1e-5], False)
    with pytest.raises(RuntimeError, match='images and channels of own'):
        ops.sum_rectify(x, [x[:1]], [None], [None], [0], [1e-5], False)
    with pytest.raises(RuntimeError, match='float32, float64 and bfloat16'):
        ops.norm_relu(x.half(), None, None, 3, 1e-5, True)


@pytest.mark.parametrize('device', ['cpu', 'meta', pytest.param('cuda', marks=needs_fake_cuda)])
def test_tensors_without_values(kernel, device):
    if device == 'meta':
        assert whole(*(torch.empty(2, 4, 6, 6, device='meta'),) * 2, None, kernel).is_meta
        return
    with FakeTensorMode(), torch.device(device):
        x = torch.empty(2, 4, 6, 6, requires_grad=True)
        y = whole(x, x, torch.rand(4), kernel)
        # Without a GPU the autograd engine has no thread for one.
        grad = torch.autograd.grad(y.sum(), x)[0] if device == 'cpu' else x
    assert y.shape == grad.shape == x.shape and y.device.type == device


def test_transforms_of_functions(kernel):
    """Forward-mode derivatives and torch.func need rules, which only torch's operators have."""
    x, v = maps(2, 4, 5, 5), maps(2, 4, 5, 5)
    if OLD_TORCH:
        # 2.9 has no forward-mode rule for a channels-last norm.
        x, v = x.contiguous(), v.contiguous()
    weight = torch.rand(4, dtype=torch.float64)

    def f(x):
        return norm_relu(x, Norm(2, weight), relu=False, kernel=kernel)

    expected = torch.autograd.functional.jvp(lambda x: f(x), x, v)[1]
    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,))[1], expected)
    torch.testing.assert_close(torch.func.grad(lambda x: (f(x) * v).sum())(x).sum(), f(x).sum() * 0)
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(x, v))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)


def test_a_norm_is_copied_and_pickled(kernel):
    module = MDEQGroupNorm(6, 3, kernel=kernel)
    x = torch.randn(2, 6, 4, 4)
    y = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(other(x), y)
    assert set(module.state_dict()) == {'weight', 'bias'}


def test_a_misspelt_kernel_is_told():
    with pytest.raises(ValueError, match=r"one of \['auto', .*Did you mean 'native'"):
        MDEQGroupNorm(6, 3, kernel='natve')
    with pytest.raises(ValueError, match='one of'):
        resolve('triton', 'cpu')


def test_what_each_kernel_stands_for():
    assert {kernel: resolve(kernel, 'cuda') for kernel in KERNELS} == dict(
        auto='native', native='native', cpp='native', compiled='compiled'
    )
    built = 'native' if extension.load() else 'cpp'
    assert resolve('auto', 'cpu') == resolve('cpp', torch.device('cpu')) == built


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """A process that has not looked for the operations, on a machine that has not built them."""
    monkeypatch.setattr(extension, '_load', functools.cache(extension._load.__wrapped__))
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    return tmp_path


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == 'mdeq_mm']


@pytest.mark.parametrize('kernel', ['auto', 'cpp'])
def test_without_a_compiler_torch_computes_and_one_line_says_why(
    kernel, unbuilt, monkeypatch, caplog
):
    monkeypatch.setenv('CXX', 'no-such-compiler -O3')
    x = torch.randn(2, 4, 3, 3)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            y = norm_relu(x, Norm(2), kernel=kernel)
            assert resolve(kernel, 'cpu') == 'native'
    assert_same(y, norm_relu(x, Norm(2), kernel='native'))
    (line,) = said(caplog)
    assert "no C++ compiler 'no-such-compiler'" in line and 'f runs on torch operators' in line


def test_without_ninja(unbuilt, monkeypatch, caplog):
    monkeypatch.setattr(extension.shutil, 'which', lambda name: None if name == 'ninja' else name)
    monkeypatch.setattr(extension.importlib.util, 'find_spec', lambda name: None)
    assert 'pip install ninja' in extension.load()
    assert len(said(caplog)) == 1


def test_a_build_that_fails_is_told_by_its_first_error(unbuilt, monkeypatch, caplog):
    def load(name, *args, build_directory, **options):
        raise RuntimeError(
            "Error building extension 'x': [1/2] c++ ops.cpp\nops.cpp:3:9: error: oh\nmore"
        )

    monkeypatch.setattr('torch.utils.cpp_extension.load', load)
    monkeypatch.setattr(extension, '_obstacle', lambda: None)
    assert extension.load() == extension.load() == 'the build failed: ops.cpp:3:9: error: oh'
    building, failed = said(caplog)
    assert 'once on this machine' in building and 'ops.cpp:3:9: error: oh' in failed
    # Nothing is left that another process would take for a build.
    assert [p.name for p in unbuilt.rglob('*') if p.is_file()] == ['lock']


def test_one_process_builds_for_all(unbuilt, monkeypatch, caplog):
    """The others find the library; a build that is interrupted leaves none."""
    built, loaded = [], []

    def load(name, sources, build_directory, **options):
        built.append(build_directory)
        with open(f'{build_directory}/{name}.so', 'w') as file:
            file.write('library')

    monkeypatch.setattr('torch.utils.cpp_extension.load', load)
    monkeypatch.setattr(torch.ops, 'load_library', loaded.append)
    monkeypatch.setattr(extension, '_obstacle', lambda: None)
    monkeypatch.setattr(extension, '_register_shapes', lambda: None)
    assert extension.load() is None
    extension._load.cache_clear()
    assert extension.load() is None
    assert len(built) == len(loaded) == 1 and loaded[0].read_text() == 'library'
    assert loaded[0].parent.parent == unbuilt and str(unbuilt) in built[0]
    assert len(said(caplog)) == 1


def test_another_processor_or_torch_builds_for_itself(monkeypatch):
    found = {extension._fingerprint.__wrapped__()}
    monkeypatch.setattr(extension, '_processor', lambda: 'avx9')
    found.add(extension._fingerprint.__wrapped__())
    monkeypatch.setattr(torch, '__version__', '99.0')
    found.add(extension._fingerprint.__wrapped__())
    assert len(found) == 3


def test_a_folder_that_cannot_be_written_is_done_without(unbuilt, monkeypatch):
    (unbuilt / 'file').write_text('')
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(unbuilt / 'file'))
    with extension._folder(extension._library()) as folder:
        assert folder.is_dir() and unbuilt not in folder.parents
    assert not folder.exists()


def test_a_term_of_another_size_must_be_upsampled(cpp):
    x = maps(2, 4, 4, 4)
    with pytest.raises(ValueError, match=r'\(2, 4, 2, 4\) .* \(2, 4, 4, 4\) unless'):
        sum_rectify(x, [Term(x[:, :, :2])], kernel=cpp)


def test_one_of_torchs_graphs_serves_calls_that_differ_in_sizes_alone(monkeypatch):
    keys = []

    def made(*key):
        keys.append(key)
        return lambda *args: args

    monkeypatch.setattr(compiled, '_compiled', made)
    x, weights = torch.zeros(2, 4, 3, 3), [torch.ones(4), None]
    calls = [
        (x, weights, 2),
        (torch.zeros(5, 4, 7, 9), weights, 2),
        (x[:, :2], weights, 2),
        (x, weights, 4),
        (x.double(), weights, 2),
        (x, [torch.ones(4).double(), None], 2),
        (x, [torch.ones(4), torch.ones(4)], 2),
    ]
    for args in calls:
        assert compiled._run('norm_relu', *args) == args
    assert keys[0] == keys[1] and len(set(keys)) == len(calls) - 1
