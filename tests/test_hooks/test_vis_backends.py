"""What SolverStatsHook measures, read back from MM's visualization backends."""

import pytest

from .test_hooks import Toy, run, scalars

TAGS = ('deq_nfe', 'deq_residual', 'deq_converged', 'deq_failed')


def trained(tmp_path, backend):
    """A toy run of 6 iterations with two validations, shown by one backend beside the local one."""
    backends = [dict(type='LocalVisBackend'), dict(type=backend)]
    visualizer = dict(type='Visualizer', vis_backends=backends, name=f'{backend}{tmp_path.name}')
    hook = dict(type='SolverStatsHook', interval=1)
    return run(tmp_path, Toy(), [hook], visualizer=visualizer)


def test_tensorboard_shows_both_solvers_at_every_iteration(tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    runner = trained(tmp_path, 'TensorboardVisBackend')
    runner.visualizer.close()
    (folder,) = {path.parent for path in tmp_path.rglob('events.out.tfevents*')}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    # MM's log processor takes the "train/" and "val/" from a tag before it shows it; validation
    # steps are told apart by having no backward pass.
    assert {*TAGS, 'deq_bwd_nfe', 'deq_bwd_residual'} <= set(events.Tags()['scalars'])
    backward = events.Scalars('deq_bwd_nfe')
    assert [(e.step, e.value) for e in backward] == [(i, 3.0) for i in range(1, 7)]
    forward = events.Scalars('deq_nfe')
    # Six iterations of training and the validations after the third and the sixth.
    assert [e.value for e in forward] == [4.0] * 8
    local = [row['deq_residual'] for row in scalars(tmp_path) if 'deq_residual' in row]
    shown = [e.value for e in events.Scalars('deq_residual')]
    assert shown == pytest.approx(local)
