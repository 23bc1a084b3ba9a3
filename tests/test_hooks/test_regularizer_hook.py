"""The penalty among the losses of a training by MM's Runner."""

import pytest
import torch

from mdeq_mm.deq import implicit_layers
from mdeq_mm.hooks import MDEQRegularizerHook

from ..test_robustness import tiny_backbone
from ..test_robustness.test_framework import Segmentor, image, loss_of, run


class Recorded(Segmentor):
    """Keeps the losses its training step logged."""

    def forward(self, inputs, mode='tensor'):
        return dict(loss_seg=super().forward(inputs, mode)['loss'])

    def train_step(self, data, optim_wrapper):
        log = super().train_step(data, optim_wrapper)
        self.__dict__.setdefault('logged', []).append({k: v.item() for k, v in log.items()})
        return log


def model(**options):
    torch.manual_seed(0)
    regularizer = dict(type='JacobianRegularizer', weight=0.5, **options)
    made = Recorded(tiny_backbone(norm_eval=True, regularizer=regularizer))
    # A Runner would draw other weights than these once more.
    made.init_weights()
    return made


def test_the_penalty_is_one_of_the_losses(tmp_path):
    trained = model()
    before = [p.clone() for p in trained.parameters()]
    reference = model()
    reference.load_state_dict(trained.state_dict())
    runner = run(tmp_path, trained, max_iters=1, custom_hooks=[MDEQRegularizerHook(), Seeded()])
    (logged,) = trained.logged
    torch.manual_seed(7)
    loss = loss_of(reference.backbone(image(4)[:2]))
    penalty = reference.backbone.implicit.pop_penalty()
    assert logged['loss_jacobian'] == pytest.approx(penalty.item(), rel=1e-5)
    assert logged['loss'] == pytest.approx((loss + penalty).item(), rel=1e-5)
    (loss + penalty).backward()
    for old, new, p in zip(before, runner.model.parameters(), reference.parameters()):
        torch.testing.assert_close(new, old - 1e-3 * p.grad, rtol=1e-4, atol=1e-6)
    # What the run changed is put back.
    assert implicit_layers(trained)[0].regularizer.weight == 0.5
    assert not trained._forward_hooks


class Seeded(MDEQRegularizerHook):
    """Seeds an iteration, after the hook it is derived from."""

    def before_train(self, runner):
        pass

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        torch.manual_seed(7)

    def after_train(self, runner):
        pass


class Weights(Seeded):
    """Notes the weight of each iteration."""

    priority = 'LOW'

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        (layer,) = implicit_layers(runner.model)
        self.seen.append(layer.regularizer and layer.regularizer.weight)


def test_weight_grows_and_ends_by_the_iteration(tmp_path):
    schedule = dict(weight_step=0.1, step_interval=2, begin_iter=1, end_iter=6)
    hook, seen = MDEQRegularizerHook(**schedule), Weights()
    trained = model(probability=0.0)
    run(tmp_path, trained, max_iters=8, custom_hooks=[hook, seen])
    assert seen.seen == pytest.approx([0.5, 0.5, 0.5, 0.6, 0.6, 0.7, None, None])
    assert implicit_layers(trained)[0].regularizer.weight == 0.5


def test_a_model_without_regularizer_trains_as_before(tmp_path):
    plain = Recorded(tiny_backbone(norm_eval=True))
    run(tmp_path, plain, max_iters=2, custom_hooks=[MDEQRegularizerHook()])
    assert [log for log in plain.logged if 'loss_jacobian' in log] == []


def test_a_schedule_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match='JacobianRegularizer'):
        run(
            tmp_path,
            Segmentor(tiny_backbone()),
            custom_hooks=[MDEQRegularizerHook(end_iter=5)],
        )
    with pytest.raises(ValueError, match='step_interval'):
        MDEQRegularizerHook(weight_step=0.1)
    with pytest.raises(ValueError, match="end_iter.*'x'"):
        MDEQRegularizerHook(end_iter='x')
