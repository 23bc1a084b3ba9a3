"""Graphs of torch.jit: traces, MM's count of operations, the old ONNX exporter."""

import pytest
import torch
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from torch.utils.flop_counter import FlopCounterMode

from . import tiny_backbone

SOLVERS = ('FixedPointIteration', 'Anderson', 'LimitedMemoryBroyden')


@pytest.mark.parametrize('kind', SOLVERS)
@pytest.mark.parametrize('grad', [False, True])
def test_a_trace_is_right_for_other_images_batches_and_sizes(kind, grad):
    net = tiny_backbone(kind, max_iter=3, tol=0.3).eval()
    # Blank: solved at once, while the images below need every evaluation.
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(net, torch.zeros(1, 3, 16, 16))
    with torch.no_grad():
        for shape in ((1, 3, 16, 16), (3, 3, 16, 16), (2, 3, 17, 23)):
            x = torch.randn(shape)
            torch.testing.assert_close(traced(x), net(x), atol=1e-4, rtol=1e-4)


def test_mm_counts_the_operations_of_every_evaluation():
    """For the whole budget, even if a solve would end earlier, as in get_flops.py."""
    net = tiny_backbone('Anderson', max_iter=3, tol=0.5).eval()
    shape = (3, 16, 16)
    found = get_model_complexity_info(net, shape, show_table=False, show_arch=False)
    counted = FlopAnalyzer(net, (torch.randn(1, *shape),)).by_operator()
    net.implicit.solver = net.implicit.solver.replace(tol=0.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randn(1, *shape))
    # MM counts multiply-adds.
    assert 2 * counted['conv'] == counter.get_total_flops()
    assert found['params'] == sum(p.numel() for p in net.parameters())
    assert found['flops'] == sum(counted.values())


def test_the_old_onnx_exporter_is_refused_and_the_new_one_named(tmp_path):
    net = tiny_backbone().eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match='dynamo=True'):
        torch.onnx.export(net, (torch.randn(1, 3, 16, 16),), str(tmp_path / 'a.onnx'), dynamo=False)
