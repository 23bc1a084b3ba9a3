"""A batch without a finite gradient changes nothing."""

import copy
import functools
import json

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner

from mdeq_mm.hooks import NonFiniteGradientHook

from ..checks import assert_finite, assert_same

SOLVER = dict(type='FixedPointIteration', max_iter=3)
SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1)
ADAM = dict(type='AdamW', lr=0.01)
BAD = 3


class Net(BaseModel):
    """A backbone with batch norm in its stem, as in the configs."""

    def __init__(self):
        super().__init__()
        self.backbone = MODELS.build(
            dict(
                type='MDEQBackbone',
                channels=(4, 4),
                expansion=1,
                stem_strides=(2,),
                norm_cfg=dict(type='GN', num_groups=2),
                solver=SOLVER,
                gradient=dict(type='ImplicitGradient', solver=SOLVER),
            )
        )

    def forward(self, inputs, mode='tensor'):
        outs = self.backbone(torch.stack(list(inputs)))
        weights = torch.linspace(-1, 1, outs[0][0].numel()).view(outs[0][0].shape)
        return dict(loss=(outs[0] * weights).sum() + outs[1].square().mean())


@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0)
    model = Net()
    # Where MM writes what it initialized: the logger of a run before may be closed.
    MMLogger.get_instance(f'nonfinite_{tmp_path}', log_level='ERROR')
    # A Runner would draw other weights than these once more.
    model.init_weights()
    return model


def batches(*bad, count=6):
    images = torch.randn(count, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for index in bad:
        images[index, 1, 0, 2, 3] = float('nan')
    return images


def run(tmp_path, model, images, optimizer=SGD, limit=50, hooks=(), resume=False, **wrapper):
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=2,
            dataset=[dict(inputs=image) for image in images.flatten(0, 1)],
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=len(images)),
        optim_wrapper=dict(optimizer=dict(optimizer), **wrapper),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
        ),
        log_processor=dict(by_epoch=False),
        custom_hooks=[dict(type='NonFiniteGradientHook', max_in_a_row=limit), *hooks],
        default_scope='mmengine',
        experiment_name=f'nonfinite_{tmp_path.name}_{resume}_{len(images)}',
        resume=resume,
    )
    runner.train()
    return runner


def by_hand(model, windows, make_optimizer, max_norm=None):
    """Plain training; each window is the batches of one step."""
    optimizer = make_optimizer(model.parameters())
    model.train()
    for window in windows:
        for images in window:
            (model(images)['loss'] / len(window)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()


def logged(tmp_path):
    (path,) = tmp_path.rglob('scalars.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


def warnings_of(tmp_path):
    lines = '\n'.join(path.read_text() for path in sorted(tmp_path.rglob('*.log'))).splitlines()
    return [line for line in lines if 'Step skipped' in line]


CASES = dict(
    sgd=(SGD, {}, 1),
    adam=(ADAM, {}, 1),
    clipped=(SGD, dict(clip_grad=dict(max_norm=0.5)), 1),
    accumulated=(SGD, dict(accumulative_counts=2), 2),
)


@pytest.mark.parametrize('case', CASES)
def test_training_ends_as_if_the_batch_had_never_been(tmp_path, net, case):
    """Weights, momentum and the running statistics of the stem's batch norm, to the bit."""
    optimizer, wrapper, window = CASES[case]
    reference = copy.deepcopy(net)
    runner = run(tmp_path, net, batches(BAD), optimizer, **copy.deepcopy(wrapper))
    # A good batch that was to share the bad one's step is lost with it.
    kept = [w for i, w in enumerate(batches().split(window)) if i != BAD // window]
    options = dict(optimizer)
    make = functools.partial(getattr(torch.optim, options.pop('type')), **options)
    by_hand(reference, kept, make, wrapper.get('clip_grad', {}).get('max_norm'))
    for name, value in reference.state_dict().items():
        assert_same(net.state_dict()[name], value, name)
    assert runner.message_hub.get_scalar('train/skipped_steps').current() == 1


def test_without_the_hook_one_batch_ruins_weights_and_statistics(net):
    """What the hook is for."""
    by_hand(net, batches(BAD).split(1), functools.partial(torch.optim.SGD, lr=0.01))
    ruined = {name for name, value in net.state_dict().items() if not torch.isfinite(value).all()}
    assert any('running_mean' in name for name in ruined)
    assert any(name in ruined for name, _ in net.named_parameters())


def test_the_log_counts_and_one_warning_says_what_to_do(tmp_path, net):
    run(tmp_path, net, batches(1, BAD))
    counts = [row.get('skipped_steps') for row in logged(tmp_path)]
    assert counts == [None, 1, 1, 2, 2, 2]
    (warning,) = warnings_of(tmp_path)
    assert 'at iteration 2' in warning and 'lower the learning rate' in warning


def test_the_average_of_weights_takes_no_nan(tmp_path, net):
    """The last batch is the bad one: nothing after it puts things right."""
    ema = EMAHook(momentum=0.5)
    run(tmp_path, net, batches(5), hooks=[ema])
    assert_finite(ema.ema_model.module.state_dict())


def test_a_resumed_run_counts_on(tmp_path, net):
    again = copy.deepcopy(net)
    run(tmp_path, net, batches(1, BAD)[:2])
    runner = run(tmp_path, again, batches(1, BAD), resume=True)
    assert runner.message_hub.get_scalar('train/skipped_steps').current() == 2


def test_a_dead_run_stops(tmp_path, net):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r'3 steps in a row.*--resume.*max_in_a_row'):
        run(tmp_path, net, batches(*range(6)), limit=3)
    for name, value in before.items():
        assert_same(net.state_dict()[name], value, name)


def test_a_good_step_ends_the_row(tmp_path, net):
    runner = run(tmp_path, net, batches(0, 1, 3, 4), limit=3)
    assert runner.iter == 6


def test_after_training_the_optimizer_is_as_before(tmp_path, net):
    runner = run(tmp_path, net, batches())
    parameter = next(net.parameters())
    parameter.grad = torch.full_like(parameter, float('nan'))
    runner.optim_wrapper.step()
    assert torch.isnan(parameter).all()


@pytest.fixture
def scaler_on_cpu(monkeypatch):
    """Let MM's mixed precision run here, in bfloat16 and with a working loss scaler."""
    from mmengine.optim.optimizer import amp_optimizer_wrapper as amp

    monkeypatch.setattr(amp, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp, 'GradScaler', functools.partial(torch.amp.GradScaler, 'cpu'))


def test_steps_that_the_loss_scaler_skips_are_counted_once(tmp_path, net, scaler_on_cpu):
    runner = run(tmp_path, net, batches(BAD), type='AmpOptimWrapper', dtype='bfloat16')
    assert runner.optim_wrapper.loss_scaler.get_scale() == 2.0**15
    assert runner.message_hub.get_scalar('train/skipped_steps').current() == 1
    assert_finite(net.state_dict())
    (warning,) = warnings_of(tmp_path)
    assert 'the loss scaler' in warning


def test_a_wrong_option_is_refused():
    with pytest.raises(ValueError, match='max_in_a_row must be an integer >= 1, got 0'):
        NonFiniteGradientHook(max_in_a_row=0)
