"""Two processes on CPUs (gloo) give the result of one process with both their batches.

The launchers are started where they are what is tested. Elsewhere both processes are forked, with
the environment that a launcher would give them.
"""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tools import test, train

from .. import forked, processes
from ..mini_datasets import write_cityscapes, write_class_folders
from .distributed_parts import GRADIENTS, work
from .test_sharded import make, step

REPO = Path(__file__).resolve().parents[2]
# Everything is in float64 and every norm is one of single samples, so that what is left between
# one process and two is the order of additions, 1e-16 each, and how solves and steps enlarge it: by
# up to 1e5 in these untrained nets.
ROUNDING = dict(rtol=1e-8, atol=1e-8)

MODEL = """
model = dict(
    type='in_float64',
    model=dict(
        type='{kind}',
        backbone=dict(
            type='MDEQBackbone',
            channels=(8, 8),
            expansion=1,
            norm_cfg=dict(type='GN', num_groups=4),
            stem_norm_cfg=dict(type='GN', num_groups=4),
            solver=dict(type='Anderson', max_iter=20, tol=0.2),
            gradient=dict(
                type='ImplicitGradient', solver=dict(type='Anderson', max_iter=20, tol=0.2)
            ),
        ),
        {head}
    ),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
custom_imports = dict(imports=['mdeq_mm', 'tests.test_robustness.distributed_parts'])
default_hooks = dict(
    logger=dict(interval=1),
    warmup=dict(type='MDEQWarmupHook', unrolled_iters=2, unrolled_layers=3, softplus_iters=1),
    solver_stats=dict(interval=1),
)
custom_hooks = [dict(type='RecordHook')]
randomness = dict(seed=0)
"""
SEGMENTOR = f"""
_base_ = [
    '{REPO}/configs/_base_/datasets/cityscapes_1024x512.py',
    '{REPO}/configs/_base_/runtime_seg.py',
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# MM has one visualizer of a name in a process, which writes where the first run of it did.
visualizer = dict(name='of these tests')
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    ),
)
""" + MODEL.format(
    kind='EncoderDecoder',
    head="""decode_head=dict(
            type='FCNHead',
            in_channels=8,
            in_index=0,
            channels=8,
            kernel_size=1,
            num_convs=1,
            concat_input=False,
            dropout_ratio=0,
            num_classes=19,
            norm_cfg=dict(type='GN', num_groups=4),
        ),
        test_cfg=dict(mode='whole'),""",
)
CLASSIFIER = f"""
_base_ = [
    '{REPO}/configs/_base_/datasets/digits.py',
    '{REPO}/configs/_base_/runtime_cls.py',
]
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
val_cfg = dict()
test_cfg = dict()
""" + MODEL.format(
    kind='ImageClassifier',
    head="""neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=8, topk=(1,)),""",
)
SYNC = "stem_norm_cfg=dict(type='SyncBN')"
# Loaders without worker processes: nothing here is worth starting one.
IN_PROCESS = [f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')]


def launch(script: str, cwd: Path, *args, expect: int = 0) -> str:
    """Run a launcher with two processes as a user does; return all that was printed."""
    env = {'PYTHON': sys.executable, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    command = ['bash', REPO / 'tools' / script, *args]
    # A process group that stays hangs for ever without a limit.
    done = processes.run(
        command, expect, env, limit=240, cwd=cwd, stderr=processes.subprocess.STDOUT
    )
    # The forks print this for each of their parts.
    assert 'Could not import OneDL' not in done.stdout
    return done.stdout


def train_here(argv: list[str]) -> None:
    """What each of two forked processes does."""
    import train

    train.main(argv)


def fork_pair(function, *args, folder: Path) -> None:
    """Call a function in both of two processes, as ranks of a group."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE='2')
    pair = [
        forked.start(
            function,
            *args,
            folder=folder,
            log=f'rank{rank}.txt',
            env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in (0, 1)
    ]
    forked.finish(pair)


class Task:
    """A tiny task with its config and data, trained by two processes and by one.

    Args:
        name: ``seg`` or ``cls``.
        folder: Where everything is.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, self.config = folder, folder / f'{name}.py'
        self.config.write_text(dict(seg=SEGMENTOR, cls=CLASSIFIER)[name])
        self.data = folder / 'data'
        # Neither number of images to evaluate is even.
        if name == 'seg':
            write_cityscapes(self.data, size=(32, 64), num_train=5, num_val=3)
        else:
            write_class_folders(self.data, dict(train=2, test=1), num_classes=9)
        self.checkpoint = folder / 'the pair' / dict(seg='iter_4.pth', cls='epoch_2.pth')[name]
        self.metric = dict(seg='mIoU', cls='accuracy/top1')[name]

    def flags(self, work_dir: str, batch_size: int) -> list[str]:
        options = [f'data_root={self.data}', f'train_dataloader.batch_size={batch_size}']
        options += ['crop_size=(32,64)'] if self.config.stem == 'seg' else []
        return ['--work-dir', str(self.folder / work_dir), '--cfg-options', *options, *IN_PROCESS]

    def record(self, work_dir: str, rank: int) -> dict:
        """What the hook of a process wrote."""
        return torch.load(self.folder / work_dir / f'rank{rank}.pt', weights_only=True)

    def scalars(self, work_dir: str, key: str, training: bool) -> list[float]:
        """What a run logged under a name while training, or in its validation."""
        (path,) = self.folder.glob(f'{work_dir}/*/vis_data/scalars.json')
        lines = map(json.loads, path.read_text().splitlines())
        return [line[key] for line in lines if key in line and ('lr' in line) == training]


@pytest.fixture(scope='module', params=['seg', 'cls'])
def task(request, tmp_path_factory):
    """Give a task after its training by two processes, 2 + 2 or 3 + 3 images a step."""
    pytest.importorskip(dict(seg='mmseg', cls='mmpretrain')[request.param])
    task = Task(request.param, tmp_path_factory.mktemp(request.param))
    task.batch_size = dict(seg=2, cls=3)[request.param]
    flags = task.flags('the pair', task.batch_size)
    argv = [str(task.config), '--launcher', 'pytorch', *flags]
    fork_pair(train_here, argv, folder=task.folder)
    return task


def test_two_processes_train_as_one_does(task):
    """Loss curve, gradients, weights, logged solver statistics, metric of the validation."""
    train.main([str(task.config), *task.flags('single', 2 * task.batch_size)])
    single = task.record('single', 0)
    pair = [task.record('the pair', rank) for rank in (0, 1)]
    assert [run['wrapped'] for run in (*pair, single)] == [True, True, False]
    # Each has half of the batch: the halves differ, and their mean is the loss of the whole.
    losses = torch.tensor([run['losses'] for run in pair], dtype=torch.float64)
    assert not torch.isclose(losses[0], losses[1]).any()
    expected = torch.tensor(single['losses'], dtype=torch.float64)
    assert_close(losses.mean(0), expected, **ROUNDING)
    for run in pair:
        for grads, whole in zip(run['grads'], single['grads'], strict=True):
            assert max(grad.abs().max() for grad in whole.values()) > 1e-3
            assert_close(grads, whole, **ROUNDING)
        assert_close(run['weights'], single['weights'], **ROUNDING)
    nfe = torch.tensor([run['nfe'][2:] for run in pair])
    assert (nfe[0] != nfe[1]).any(), 'no process had other counts than the other'
    assert_close(nfe.mean(0), torch.tensor(single['nfe'][2:]))
    for name in ('nfe', 'residual', 'bwd_nfe', 'bwd_residual'):
        key = f'train/deq_{name}'
        logged = torch.tensor(
            [task.scalars(run, key, training=True) for run in ('the pair', 'single')]
        )
        # The statistics are float32, and the log rounds them.
        assert logged.shape[1] >= 2
        assert_close(logged[0], logged[1], rtol=1e-3, atol=1e-4)
    together, alone = (task.scalars(run, task.metric, False) for run in ('the pair', 'single'))
    assert together == alone and len(alone) == 1


@pytest.mark.parametrize('task', ['cls'], indirect=True)
def test_two_processes_evaluate_as_one_does(task):
    """The data sets are of odd size: the sampler repeats an image, which must not count."""
    flags = task.flags('test', task.batch_size)
    out = launch('dist_test.sh', task.folder, task.config, task.checkpoint, 2, *flags)
    (together,) = re.findall(rf'\(test\).* {task.metric}: (\d+\.\d+)', out)
    flags = task.flags('test_single', task.batch_size)
    _, metrics = test.main([str(task.config), str(task.checkpoint), *flags])
    assert 0 < metrics[task.metric] < 100
    assert float(together) == pytest.approx(metrics[task.metric], abs=1e-4)


def test_a_failing_process_ends_the_run(tmp_path):
    """An image that cannot be read, which the sampler gives to the second process.

    The first iteration goes well, with SyncBN as BN: PyTorch has none for CPUs.
    """
    pytest.importorskip('mmpretrain')
    task = Task('cls', tmp_path)
    sync = CLASSIFIER.replace("stem_norm_cfg=dict(type='GN', num_groups=4)", SYNC)
    assert SYNC in sync
    task.config.write_text(sync)
    broken = sorted((task.data / 'train').glob('*/*.png'))[9]
    broken.write_bytes(b'no image')
    flags = [*task.flags('the pair', 3), 'train_dataloader.sampler.shuffle=False']
    out = launch('dist_train.sh', tmp_path, task.config, 2, *flags, expect=1)
    assert re.search(r'WARNING - .*no SyncBN for CPUs', out), out[-3000:]
    assert re.search(r'\(train\) +\[1\]\[1/3\].* loss: \d', out), out[-3000:]
    # The process at fault, and the file.
    assert re.search(r'rank\s*: 1 ', out), out[-3000:]
    assert re.search(r'\[rank1\].*Error', out), out[-3000:]
    assert str(broken) in out
    assert not task.checkpoint.exists()


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """Give what each of two processes saw, which ``distributed_parts.work`` describes."""
    folder = tmp_path_factory.mktemp('pair')
    # A process waiting in a collective for 60 s raises, which ends both.
    fork_pair(work, folder=folder)
    results = [torch.load(folder / f'pair{rank}.pt', weights_only=True) for rank in (0, 1)]

    def of(*names):
        """What both processes have under some names; a part that failed fails who asks for it."""
        for rank, result in enumerate(results):
            for name in names:
                if 'error' in result[name]:
                    pytest.fail(f'process {rank}, {name}:\n{result[name]["error"]}', pytrace=False)
        parts = [{name: result[name] for name in names} for result in results]
        return parts if len(names) > 1 else [part[names[0]] for part in parts]

    return of


@pytest.mark.parametrize('gradient', GRADIENTS)
def test_every_parameter_gets_its_gradient_before_and_after_the_warmup(pair, gradient):
    """Without find_unused_parameters: a parameter that was missed makes the next step raise."""
    first, second = pair(gradient)
    assert len(first['grads']) == 4
    for ours, theirs in zip(first['grads'], second['grads'], strict=True):
        assert ours.keys() == first['weights'].keys()
        assert [name for name, grad in ours.items() if not grad.isfinite().all()] == []
        assert_close(ours, theirs, rtol=0, atol=0)
    assert_close(first['weights'], second['weights'], rtol=0, atol=0)
    # Three unrolled layers until the second iteration, then a solve and the call for the graph.
    calls = [seen['calls'] for seen in first['seen']]
    assert calls[:2] == [3, 3] and all('forward' not in seen for seen in first['seen'][:2])
    extra = 2 if gradient == 'PhantomGradient' else 1
    assert calls[2:] == [seen['forward']['longest'] + extra for seen in first['seen'][2:]]


def test_batch_norm_takes_each_process_s_own_batch(pair):
    first, second = (found['running_mean'] for found in pair('ImplicitGradient'))
    assert not torch.allclose(first, second), f'both have {first.tolist()}'


def test_solves_of_different_length_wait_for_nobody(pair):
    """A collective within either solve would be called more often by one of the processes."""
    for name in GRADIENTS:
        passes = ('forward', 'backward') if name == 'ImplicitGradient' else ('forward',)
        for first, second in zip(*(found['seen'][2:] for found in pair(name))):
            for solve in passes:
                calls = [seen[solve]['longest'] for seen in (first, second)]
                assert calls[0] > 2 * calls[1], (name, solve)


def test_statistics_are_means_over_processes(pair):
    first, second = (found['seen'][2:] for found in pair('ImplicitGradient'))
    for one, two in zip(first, second):
        assert one['logged'] == two['logged']
        fields = ('nfe', 'residual', 'converged', 'failed')
        prefixes = dict(deq_='forward', deq_bwd_='backward')
        assert set(one['logged']) == {prefix + field for prefix in prefixes for field in fields}
        for prefix, solve in prefixes.items():
            for field in fields:
                mean = (one[solve][field] + two[solve][field]) / 2
                assert one['logged'][prefix + field] == pytest.approx(mean)
            assert one[solve]['nfe'] != two[solve]['nfe']


def test_a_process_with_nothing_to_report_neither_counts_nor_blocks(pair):
    one, two = pair('uneven')
    assert one['logged'] == two['logged']
    logged = one['logged']
    # Only the first process evaluated anything, and only it had a backward solve.
    assert logged['val/val/deq_nfe'] == pytest.approx(one['own']['forward']['nfe'])
    assert logged['train/train/deq_bwd_nfe'] == pytest.approx(one['own']['backward']['nfe'])
    mean = (one['own']['forward']['nfe'] + two['own']['forward']['nfe']) / 2
    assert logged['train/train/deq_nfe'] == pytest.approx(mean)


def test_masks_differ_between_processes_and_iterations_but_not_within_a_solve(pair):
    for name in GRADIENTS:
        first, second = (found['seen'] for found in pair(name))
        for found in (first, second):
            assert [seen['constant'] for seen in found] == [True] * len(found), name
        for one, two in zip(first, second):
            for ours, theirs in zip(one['masks'], two['masks'], strict=True):
                assert not torch.equal(ours, theirs)
        for before, after in zip(first, first[1:]):
            for ours, theirs in zip(before['masks'], after['masks'], strict=True):
                assert not torch.equal(ours, theirs)


def test_sharded_over_two_processes_a_net_steps_as_the_plain_one(pair):
    _, expected = step(make('Anderson', GRADIENTS['ImplicitGradient'], 0.0))
    for results in pair('sharded'):
        for got in results.values():
            assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_masks_differ_between_processes_of_one_seed(pair):
    """As in MM's own runtime configs, where every process starts from the same seed."""
    first, second = (found['drawn'] for found in pair('masks'))
    assert first.shape == second.shape == (2, 4, 32, 1, 1)
    # Four masks of 4 x 32 fair coins: equal halves, and all unrelated.
    masks = torch.cat([first, second]).flatten(1) > 0
    assert (masks.float().mean(1) - 0.5).abs().max() < 0.2
    agreement = (masks[:, None] == masks).float().mean(2)
    assert (agreement - torch.eye(4) - 0.5 * (1 - torch.eye(4))).abs().max() < 0.2
