"""The model of a config; finding its MDEQ, and solving it with other budgets temporarily."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mdeq_mm.apis import build_model, evaluations_allowed, find_backbone, load_model
from mdeq_mm.deq import (
    Anderson,
    FixedPointIteration,
    FunctionProblem,
    ImplicitGradient,
    ImplicitLayer,
)


class Contraction(nn.Module):
    """z = z / 2 + x, whose equilibrium is 2 x, in a net of one's own."""

    def __init__(self, **options):
        super().__init__()
        solver = FixedPointIteration(max_iter=7, tol=0, jitter=(4, 9))
        self.implicit = ImplicitLayer(solver, ImplicitGradient(Anderson()), **options)

    def problem(self, x):
        return FunctionProblem(lambda z: z / 2 + x, torch.zeros_like(x))

    def forward(self, x):
        return self.implicit(self.problem(x))


X = torch.ones(2, 3, dtype=torch.float64)


def after(evaluations):
    """f applied so many times to 0, once more after the solve included."""
    return 2 * X * (1 - 0.5**evaluations)


@pytest.mark.parametrize('solver', [None, FixedPointIteration(max_iter=3, tol=0)])
def test_a_budget_holds_in_the_block_and_the_model_is_as_before(solver):
    net = Contraction(eval_solver=solver).eval()
    before = dict(vars(net.implicit))
    for count in (1, 2, 20):
        with evaluations_allowed(net.implicit, count):
            # The iterate of smallest residual is that of the second to last evaluation.
            torch.testing.assert_close(net(X), after(count), atol=0, rtol=0)
            assert net.implicit.forward_stats.num_iter.tolist() == [count, count]
        assert vars(net.implicit) == before
    with pytest.raises(RuntimeError), evaluations_allowed(net.implicit, 2):
        raise RuntimeError
    assert vars(net.implicit) == before


def test_a_budget_is_for_evaluation_and_leaves_the_training_solver():
    net = Contraction(eval_solver=FixedPointIteration(max_iter=3))
    solver = net.implicit.solver
    with evaluations_allowed(net.implicit, 2):
        assert net.implicit.solver is solver and net.implicit.current_solver is solver
        assert net.implicit.eval_solver == FixedPointIteration(max_iter=2)


def test_an_unrolled_net_has_so_many_layers_in_the_block():
    net = Contraction(unrolled_layers=5).eval()
    with evaluations_allowed(net.implicit, 2):
        torch.testing.assert_close(net(X), after(2), atol=0, rtol=0)
    torch.testing.assert_close(net(X), after(5), atol=0, rtol=0)


def test_a_net_of_ones_own_is_found():
    net = Contraction()
    model = nn.ModuleDict({'backbone': net, 'head': nn.Linear(2, 2)})
    assert find_backbone(model) is net


def test_a_model_without_equilibrium_is_told():
    with pytest.raises(ValueError, match='0 MDEQBackbone'):
        find_backbone(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='2 MDEQBackbone'):
        find_backbone(nn.ModuleList([Contraction(), Contraction()]))


def classifier(**options):
    pytest.importorskip('mmpretrain')
    backbone = dict(type='MDEQBackbone', channels=(8,), expansion=1)
    backbone['stem_norm_cfg'] = dict(type='SyncBN')
    dataset = dict(type='CIFAR10', data_root='none', pipeline=[])
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(type='ImageClassifier', backbone=backbone),
            data_preprocessor=dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True),
            test_dataloader=dict(dataset=dict(dataset, **options)),
        )
    )


def test_a_model_is_built_for_evaluation_by_one_process_with_its_preprocessor():
    model = build_model(classifier())
    assert not model.training
    assert [name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)] == []
    preprocessor = model.data_preprocessor
    assert preprocessor.mean.flatten().tolist() == [1, 2, 3]
    assert preprocessor.std.flatten().tolist() == [4, 5, 6]
    cfg = classifier()
    cfg.model.data_preprocessor = dict(mean=[7.0] * 3, std=[1.0] * 3)
    assert build_model(cfg).data_preprocessor.mean.flatten().tolist() == [7, 7, 7]


def test_classes_are_those_of_the_checkpoint_else_of_the_config_else_of_the_data_set(tmp_path):
    known = load_model(classifier(), None, 'cpu').dataset_meta['classes']
    assert len(known) == 10 and 'airplane' in known
    own = classifier(metainfo=dict(classes=['a', 'b']))
    model = load_model(own, None, 'cpu')
    assert model.dataset_meta['classes'] == ['a', 'b']
    path = str(tmp_path / 'weights.pth')
    weights = model.state_dict()
    torch.save(dict(state_dict=weights, meta=dict(dataset_meta=dict(classes=['c']))), path)
    assert load_model(own, path, 'cpu').dataset_meta == dict(classes=['c'])
    for meta in (dict(), None):
        torch.save(dict(state_dict=weights, meta=meta), path)
        assert load_model(own, path, 'cpu').dataset_meta['classes'] == ['a', 'b']


def test_a_checkpoint_that_lacks_a_weight_or_has_another_is_refused(tmp_path):
    path = str(tmp_path / 'weights.pth')
    weights = build_model(classifier()).state_dict()
    name = 'backbone.stem.0.conv.weight'
    for others in ({k: v for k, v in weights.items() if k != name}, dict(weights, other=X)):
        torch.save(dict(state_dict=others), path)
        with pytest.raises(ValueError, match='does not fit this config'):
            load_model(classifier(), path, 'cpu')
