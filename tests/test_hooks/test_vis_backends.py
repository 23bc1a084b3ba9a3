"""What SolverStatsHook measures, read back from MM's visualization backends."""

import pytest

from .test_hooks import Toy, run, scalars

FIELDS = ('nfe', 'residual', 'converged', 'failed')


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
    solves = ('train/deq', 'train/deq_bwd', 'val/deq')
    wanted = {f'{solve}_{field}' for solve in solves for field in FIELDS}
    assert {tag for tag in events.Tags()['scalars'] if 'deq_' in tag} == wanted
    backward = events.Scalars('train/deq_bwd_nfe')
    assert [(e.step, e.value) for e in backward] == [(i, 3.0) for i in range(1, 7)]
    forward = events.Scalars('train/deq_nfe')
    assert [(e.step, e.value) for e in forward] == [(i, 4.0) for i in range(1, 7)]
    assert [(e.step, e.value) for e in events.Scalars('val/deq_nfe')] == [(3, 4.0), (6, 4.0)]
    rows = scalars(tmp_path)
    for tag in ('train/deq_residual', 'val/deq_residual'):
        local = [row[tag] for row in rows if tag in row]
        assert [e.value for e in events.Scalars(tag)] == pytest.approx(local)
