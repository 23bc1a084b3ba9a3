"""Every gradient trains the digits network: whole trainings, some minutes each."""

from pathlib import Path

import pytest
import torch

from tools import train
from tools.dataset_converters import digits

ROOT = Path(__file__).resolve().parents[2]

CONFIG = f'_base_ = {str(ROOT / "configs/mdeq_tiny_digits.py")!r}\n'
GRADIENT = 'model = dict(backbone=dict(gradient=dict(_delete_=True, {})))\n'
EXACT = "type='ImplicitGradient', solver=dict(type='Anderson', max_iter=8)"
# The inverse of a Broyden solve is what its backward pass shares.
BROYDEN = "solver=dict(_delete_=True, type='LimitedMemoryBroyden', max_iter=8, jitter=(5, 20))"
SHARED = f"model = dict(backbone=dict({BROYDEN}, gradient=dict(type='SharedInverseGradient')))\n"
NO_WARMUP = 'default_hooks = dict(warmup=dict(unrolled_iters=0, softplus_iters=0))\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [
        '',
        GRADIENT.format(EXACT),
        GRADIENT.format("type='TruncatedGradient'"),
        SHARED,
        GRADIENT.format("type='PhantomGradient'") + NO_WARMUP,
    ],
    ids=['jacobian-free', 'implicit', 'truncated', 'shared inverse', 'phantom without warm-up'],
)
def test_every_gradient_trains_the_digits(changes, tmp_path):
    pytest.importorskip('mmpretrain')
    # The one test that is long enough for a second thread to pay.
    torch.set_num_threads(2)
    digits.build(tmp_path / 'digits')
    config = tmp_path / 'config.py'
    config.write_text(CONFIG + changes)
    options = [f'data_root={tmp_path / "digits"}', 'default_hooks.checkpoint.interval=100']
    flags = ['--work-dir', str(tmp_path / 'work'), '--cfg-options', 'randomness.seed=0', *options]
    runner = train.main([str(config), *flags])
    assert runner.message_hub.get_scalar('val/accuracy/top1').current() >= 97
