"""tools/train.py and tools/test.py, from the command line and from Python."""

import json
import os
import pickle
import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import ApexOptimWrapper, OptimWrapper
from mmengine.runner import Runner

from mdeq_mm.apis import DATALOADERS, build_runner, check_data
from tools import demo, test, train

from ..checks import assert_same
from ..mini_datasets import write_cityscapes, write_class_folders

REPO = Path(__file__).resolve().parents[2]

TINY_BACKBONE = """
    backbone=dict(
        type='MDEQBackbone',
        channels=(8, 8),
        expansion=1,
        norm_cfg=dict(type='GN', num_groups=4),
        stem_norm_cfg=dict(type='{norm}'),
        solver=dict(type='FixedPointIteration', max_iter=3, tol=1e-3),
        gradient=dict(
            type='ImplicitGradient',
            solver=dict(type='FixedPointIteration', max_iter=3, tol=1e-3),
        ),
    ),
"""
SEGMENTOR = f"""
_base_ = [
    '{REPO}/configs/_base_/datasets/cityscapes_1024x512.py',
    '{REPO}/configs/_base_/runtime_seg.py',
]
model = dict(
    type='EncoderDecoder',
    {TINY_BACKBONE.format(norm='SyncBN')}
    decode_head=dict(
        type='FCNHead',
        in_channels=(8, 8),
        in_index=(0, 1),
        input_transform='resize_concat',
        channels=16,
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        num_classes=19,
        norm_cfg=dict(type='SyncBN'),
        loss_decode=dict(type='CrossEntropyLoss'),
    ),
    test_cfg=dict(mode='whole'),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
param_scheduler = [dict(type='PolyLR', power=0.9, begin=0, end=4, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=12)
custom_imports = dict(imports=['mdeq_mm', 'tests.plain_dump'])
"""
CLASSIFIER = f"""
_base_ = [
    '{REPO}/configs/_base_/datasets/digits.py',
    '{REPO}/configs/_base_/runtime_cls.py',
]
model = dict(
    type='ImageClassifier',
    {TINY_BACKBONE.format(norm='BN')}
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=8,
        loss=dict(type='CrossEntropyLoss'),
        topk=(1,),
    ),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(enable=False, base_batch_size=10)
custom_imports = dict(imports=['mdeq_mm', 'tests.plain_dump'])
"""
# Data loaders without worker processes: nothing here is worth starting one.
IN_PROCESS = [f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')]


@pytest.fixture(scope='module')
def cityscapes(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp('data') / 'cityscapes')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp('data') / 'digits', dict(train=2, test=1))


@pytest.fixture(scope='module')
def seg_checkpoint(tmp_path_factory, cityscapes):
    """Train the tiny segmentor for its two iterations, once for all tests that load it."""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'seg.py').write_text(SEGMENTOR)
    options = ['--cfg-options', f'data_root={cityscapes}', 'crop_size=(32,64)', *IN_PROCESS]
    train.main([str(folder / 'seg.py'), '--work-dir', str(folder), '--no-validate', *options])
    return str(folder / 'iter_2.pth')


@pytest.fixture
def tiny(tmp_path, cityscapes, digits, monkeypatch):
    """Give a folder with the two tiny configs, as working directory."""
    (tmp_path / 'seg.py').write_text(SEGMENTOR)
    (tmp_path / 'cls.py').write_text(CLASSIFIER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def seg_options(cityscapes):
    return ['--cfg-options', f'data_root={cityscapes}', 'crop_size=(32,64)', *IN_PROCESS]


@pytest.fixture
def cls_options(digits):
    return ['--cfg-options', f'data_root={digits}', *IN_PROCESS]


def logged(work_dir, key):
    """Read what a run wrote into its scalars under a name."""
    lines = []
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_large_cityscapes_end_to_end(tmp_path):
    """The config itself: only the data's place, the crop, the counts and the widths are others."""
    cityscapes = write_cityscapes(tmp_path / 'cityscapes', num_val=1)
    config = str(REPO / 'configs/mdeq_large_cityscapes.py')
    options = ['--cfg-options', f'data_root={cityscapes}', 'crop_size=(32,64)', *IN_PROCESS]
    solvers = ('solver', 'gradient.solver')
    options += [f'model.backbone.{solver}.max_iter=3' for solver in solvers]
    # A tenth of the widths: 56 million parameters take longest to draw and to save.
    options += ['model.backbone.channels=(8,16,32,64)', 'model.decode_head.channels=120']
    options += ['model.decode_head.in_channels=(8,16,32,64)']
    options += ['train_dataloader.batch_size=2']
    options += ['train_cfg.max_iters=2', 'train_cfg.val_interval=2']
    # MM has one visualizer per name and process, which writes where the first run did.
    options += ['visualizer.name=end_to_end', 'default_hooks.solver_stats.interval=1']
    options += [f'default_hooks.warmup.{phase}_iters=1' for phase in ('unrolled', 'softplus')]
    work_dir = tmp_path / 'train'
    train.main([config, '--work-dir', str(work_dir), *options])
    # The first iteration is unrolled and solves nothing; the last trains what is tested.
    assert logged(work_dir, 'train/deq_nfe') == [3]
    losses = logged(work_dir, 'loss')
    assert losses and np.isfinite(losses).all(), losses

    checkpoint = str(work_dir / 'iter_2.pth')
    _, tested = test.main([config, checkpoint, '--work-dir', str(tmp_path / 'test'), *options])
    assert tested['mIoU'] == pytest.approx(logged(work_dir, 'mIoU')[-1], abs=5e-3)


def test_demo_trains_evaluates_and_paints(tmp_path, monkeypatch, capsys):
    options = [
        '--cfg-options',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'train_dataloader.batch_size=2',
        'model.backbone.solver.max_iter=2',
        'model.backbone.solver.jitter=(1,3)',
        *IN_PROCESS,
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['demo.py', *options])

    def convert(command, check):
        """The converter, which the demo starts, here and for a few scenes only."""
        python, script, *arguments = command
        assert python == sys.executable and check
        with monkeypatch.context() as patch:
            few = ['--num-train', '4', '--num-val', '8']
            patch.setattr(sys, 'argv', [script, *arguments, *few])
            runpy.run_path(script, run_name='__main__')

    monkeypatch.setattr(demo, 'subprocess', SimpleNamespace(run=convert))
    demo.main()
    out = capsys.readouterr().out
    assert re.search(r'^mIoU on 8 validation scenes: \d+\.\d$', out, re.MULTILINE)
    path = out.splitlines()[-1].split(': ')[1]
    assert path == 'work_dirs/mdeq_demo_digit_scenes/demo.png'
    image = cv2.imread(str(tmp_path / path))
    # More than one colour: something was painted.
    assert image is not None and image.std() > 10


def test_resume_goes_on_where_the_checkpoint_ends(tiny, seg_options):
    first = train.main(['seg.py', *seg_options])
    assert first.iter == 2 and first.work_dir == str(tiny / 'work_dirs/seg')
    before = first.model.state_dict()['decode_head.conv_seg.weight'].clone()

    resumed = train.main(['seg.py', '--resume', *seg_options])
    after = resumed.model.state_dict()['decode_head.conv_seg.weight']
    assert resumed.iter == 2
    assert_same(before, after)

    checkpoint = 'work_dirs/seg/iter_2.pth'
    longer = [*seg_options, 'train_cfg.max_iters=3']
    third = train.main(['seg.py', '--resume', checkpoint, '--work-dir', 'more', *longer])
    assert third.iter == 3
    assert (tiny / 'more/iter_3.pth').is_file() and not (tiny / 'more/iter_1.pth').exists()


def test_sync_bn_runs_as_bn_on_one_process(tiny, seg_options):
    runner = train.main(['seg.py', '--no-validate', *seg_options])
    kinds = {type(m) for m in runner.model.modules()}
    assert torch.nn.SyncBatchNorm not in kinds
    assert runner.cfg.model.backbone.stem_norm_cfg.type == 'SyncBN'


def test_no_validate_neither_validates_nor_wants_validation_data(
    tiny, tmp_path_factory, seg_options
):
    root = write_cityscapes(tmp_path_factory.mktemp('half') / 'cityscapes')
    (root / 'leftImg8bit/val').rename(root / 'elsewhere')
    options = [*seg_options, f'data_root={root}']
    runner = train.main(['seg.py', '--no-validate', *options])
    assert runner.iter == 2
    assert logged(runner.work_dir, 'mIoU') == []


def test_segmentation_outputs(tiny, seg_options, seg_checkpoint):
    flags = ['--out', 'maps', '--show-dir', 'shown', '--work-dir', 'test']
    # MM has one visualizer of a name in a process, which writes where the first run of it did.
    test.main(['seg.py', seg_checkpoint, *flags, *seg_options, 'visualizer.name=outputs'])
    maps = sorted((tiny / 'maps').glob('*.png'))
    assert [p.name for p in maps] == [f'lindau_{i:06d}_000019_leftImg8bit.png' for i in range(2)]
    predicted = cv2.imread(str(maps[0]), cv2.IMREAD_UNCHANGED)
    assert predicted.shape == (64, 128) and predicted.max() < 19
    painted = list((tiny / 'shown').rglob('*.png'))
    assert len(painted) == 2


def test_a_run_of_segmentation_begins_with_the_mended_class_weights(monkeypatch):
    calls = []
    monkeypatch.setattr('mdeq_mm.apis.runner.patch_class_weights', lambda: calls.append('mended'))
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: calls.append('built'))
    for scope in ('mmseg', 'mmpretrain'):
        build_runner(Config(dict(launcher='none', default_scope=scope)))
    assert calls == ['mended', 'built', 'built']


def test_tta_averages_over_scales_and_flips(tiny, seg_options, seg_checkpoint):
    runner, _ = test.main(['seg.py', seg_checkpoint, '--tta', *seg_options])
    assert type(runner.model).__name__ == 'SegTTAModel'
    views = runner.test_dataloader.dataset[0]['inputs']
    assert len(views) == 12 and len({v.shape for v in views}) == 6


def test_tta_of_a_data_set_inside_another(tiny, seg_options, seg_checkpoint):
    cfg = Config.fromfile('seg.py')
    inner = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner, inner.copy()])
    cfg.dump('two.py')
    runner, _ = test.main(['two.py', seg_checkpoint, '--tta', *seg_options])
    data = runner.test_dataloader.dataset
    assert [len(data[i]['inputs']) for i in range(len(data))] == [12] * 4


def test_a_config_without_a_test_is_told_so(tiny):
    (tiny / 'none.py').write_text(SEGMENTOR + 'test_dataloader = test_evaluator = None\n')
    torch.save(dict(state_dict={}), 'net.pth')
    with pytest.raises(SystemExit, match='none.py has no test_dataloader, test_evaluator, which'):
        test.main(['none.py', 'net.pth', '--amp'])


def test_classification_outputs(tiny, cls_options):
    runner = train.main(['cls.py', '--auto-scale-lr', *cls_options])
    # The batch size is 32, and the learning rate is given for 10.
    assert runner.optim_wrapper.get_lr()['lr'][0] == pytest.approx(0.032)
    checkpoint = 'work_dirs/cls/epoch_1.pth'
    _, plain = test.main(['cls.py', checkpoint, '--out', 'pred.pkl', *cls_options])
    predictions = pickle.loads((tiny / 'pred.pkl').read_bytes())
    hits = [int(p['pred_label']) == int(p['gt_label']) for p in predictions]
    assert len(hits) == 10
    assert plain['accuracy/top1'] == pytest.approx(100 * np.mean(hits))

    flags = ['--out', 'm.json', '--out-item', 'metrics', '--tta']
    runner, metrics = test.main(['cls.py', checkpoint, *flags, *cls_options])
    assert json.loads((tiny / 'm.json').read_text()) == metrics
    assert type(runner.model).__name__ == 'AverageClsScoreTTA'
    # The image and its mirror image.
    mirrored, plain = runner.test_dataloader.dataset[0]['inputs']
    torch.testing.assert_close(mirrored.flip(-1), plain, atol=0, rtol=0)
    assert not torch.equal(mirrored, plain), 'an image that is its own mirror image tells nothing'
    test.main(['cls.py', checkpoint, '--show-dir', 'shown', '--interval', '5', *cls_options])
    assert len(list((tiny / 'shown').iterdir())) == 2


def test_options_win_over_flags_and_reach_what_was_made_from_them(tiny, seg_options):
    args = train.parse_args(
        [
            'seg.py',
            '--work-dir',
            'flag',
            *seg_options,
            'work_dir=option',
            'train_dataloader.batch_size=2',
            'model.backbone.solver.max_iter=7',
            'model.decode_head.norm_cfg.type=BN',
        ]
    )
    cfg = train.prepare(args)
    assert cfg.work_dir == 'option'
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.model.backbone.solver.max_iter == 7
    assert cfg.model.decode_head.norm_cfg.type == 'BN'
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == (32, 64)
    assert cfg.data_preprocessor['size'] == (32, 64)
    roots = {cfg[f'{s}_dataloader'].dataset.data_root for s in ('train', 'val', 'test')}
    assert len(roots) == 1 and roots != {'data/cityscapes/'}


def test_an_option_for_one_place_wins_over_the_shared_name(tiny, seg_options):
    own = 'train_dataloader.dataset.pipeline.3.crop_size=(16,16)'
    cfg = train.prepare(train.parse_args(['seg.py', *seg_options, own]))
    assert tuple(cfg.train_dataloader.dataset.pipeline[3].crop_size) == (16, 16)
    assert cfg.data_preprocessor['size'] == (32, 64)


def test_flags_turn_off_what_a_config_asks_of_its_loaders(tiny, digits):
    (tiny / 'own.py').write_text(f'{CLASSIFIER}train_dataloader = dict(pin_memory=True)\n')
    options = ['--cfg-options', f'data_root={digits}']
    for flags, expected in (
        ([], (True, True)),
        (['--no-pin-memory'], (False, True)),
        (['--no-persistent-workers'], (True, False)),
    ):
        cfg = train.prepare(train.parse_args(['own.py', *flags, *options]))
        loader = cfg.train_dataloader
        assert (loader.pin_memory, loader.persistent_workers) == expected, flags
    torch.save(dict(state_dict={}), 'net.pth')
    (tiny / 'own.py').write_text(f'{CLASSIFIER}val_dataloader = dict(pin_memory=True)\n')
    for flags, expected in (([], torch.cuda.is_available()), (['--no-pin-memory'], False)):
        cfg = test.prepare(test.parse_args(['own.py', 'net.pth', *flags, *options]))
        assert cfg.test_dataloader.pin_memory is expected


def test_what_a_config_resumes_or_loads_gives_way_to_the_command_line(tiny, cls_options):
    for name in ('other.pth', 'net.pth'):
        torch.save(dict(state_dict={}), name)
    (tiny / 'own.py').write_text(f"{CLASSIFIER}resume = True\nload_from = 'other.pth'\n")

    def loaded(tool, *argv):
        cfg = tool.prepare(tool.parse_args([*argv, *cls_options]))
        return cfg.load_from, cfg.resume

    assert loaded(train, 'own.py') == ('other.pth', True)
    assert loaded(train, 'own.py', '--resume', 'net.pth') == ('net.pth', True)
    # No checkpoint is in the work_dir: from the beginning.
    assert loaded(train, 'own.py', '--resume') == (None, False)
    assert loaded(test, 'own.py', 'net.pth') == ('net.pth', False)


def test_pretrained_weights_of_a_part_are_checked_before_anything_is_built(tiny, cls_options):
    options = ['model.backbone.init_cfg.type=Pretrained']
    options += ['model.backbone.init_cfg.checkpoint=none.pth']
    with pytest.raises(SystemExit, match='train.py: checkpoint none.pth does not exist'):
        train.main(['cls.py', *cls_options, *options])


def test_augmentation_at_test_time_is_the_config_s_own_and_options_name_its_model(
    tiny, cls_options
):
    torch.save(dict(state_dict={}), 'net.pth')
    own = "tta_pipeline = [dict(type='TestTimeAug', transforms=[[dict(type='PackInputs')]])]\n"
    (tiny / 'own.py').write_text(f'{CLASSIFIER}{own}')
    argv = ['own.py', 'net.pth', '--tta', *cls_options, 'model.backbone.solver.max_iter=9']
    cfg = test.prepare(test.parse_args(argv))
    assert [step.type for step in cfg.test_dataloader.dataset.pipeline] == ['TestTimeAug']
    assert cfg.model.type == 'AverageClsScoreTTA'
    assert cfg.model.module.backbone.solver.max_iter == 9
    (tiny / 'own.py').write_text(f'{SEGMENTOR}tta_model = None\n')
    with pytest.raises(SystemExit, match='--tta: the config has no tta_model; add one'):
        test.main(['own.py', 'net.pth', '--tta'])


def test_painting_is_set_up_as_the_flags_say(tiny, seg_options, cls_options):
    torch.save(dict(state_dict={}), 'net.pth')
    flags = ['--show-dir', 'shown', '--interval', '5', '--wait-time', '3']
    for name, options in (('seg.py', seg_options), ('cls.py', cls_options)):
        cfg = test.prepare(test.parse_args([name, 'net.pth', *flags, *options]))
        hook = cfg.default_hooks.visualization
        assert (hook.show, hook.wait_time, hook.interval) == (False, 3, 5)
        if name == 'seg.py':
            assert hook.draw is True and cfg.visualizer.save_dir == 'shown'
        else:
            assert hook.enable is True and hook.out_dir == 'shown'
        cfg = test.prepare(test.parse_args([name, 'net.pth', '--show', *options]))
        assert cfg.default_hooks.visualization.show is True


def test_without_gpus_processes_talk_by_gloo_and_sync_bn_becomes_bn(tiny, seg_options, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cfg = train.prepare(train.parse_args(['seg.py', '--launcher', 'pytorch', *seg_options]))
    assert cfg.env_cfg.dist_cfg.backend == 'gloo'
    assert cfg.model.backbone.stem_norm_cfg.type == 'BN'
    assert cfg.model.decode_head.norm_cfg.type == 'BN'
    # As the Runner wraps a model, but for the GPU of each process.
    wrapper = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
    assert cfg.model_wrapper_cfg == dict(wrapper, find_unused_parameters=False)
    unused = [*seg_options, 'find_unused_parameters=True']
    cfg = train.prepare(train.parse_args(['seg.py', '--launcher', 'pytorch', *unused]))
    assert cfg.model_wrapper_cfg == dict(wrapper, find_unused_parameters=True)
    with pytest.raises(ValueError, match='--launcher slurm without a GPU'):
        train.prepare(train.parse_args(['seg.py', '--launcher', 'slurm', *seg_options]))


def test_a_missing_file_is_one_line_and_an_error(tiny):
    with pytest.raises(SystemExit, match='test.py: checkpoint none.pth does not exist'):
        test.main(['seg.py', 'none.pth'])
    with pytest.raises(SystemExit, match='^train.py: config none.py does not exist$'):
        train.main(['none.py'])


@pytest.mark.parametrize('missing', ['', 'leftImg8bit/val', 'gtFine/train'])
def test_missing_data_are_named_before_anything_is_built(tiny, tmp_path_factory, missing):
    root = write_cityscapes(tmp_path_factory.mktemp('lacking') / 'cityscapes')
    (root / missing).rename(root.parent / 'moved')
    with pytest.raises(SystemExit, match='wants the folder') as error:
        train.main(['seg.py', '--cfg-options', f'data_root={root}'])
    assert str(root / missing) in str(error.value) and 'docs/data.md' in str(error.value)
    assert not (tiny / 'work_dirs').exists()


def test_data_sets_that_fetch_themselves_are_not_wanted_beforehand(tiny):
    cfg = Config.fromfile(REPO / 'configs/_base_/datasets/cifar10.py')
    cfg.default_scope = 'mmpretrain'
    check_data(cfg, DATALOADERS)
    cfg.test_dataloader.dataset.download = False
    with pytest.raises(FileNotFoundError, match='test_dataloader wants the folder data/cifar10'):
        check_data(cfg, DATALOADERS)


def test_a_checkpoint_that_would_run_code_is_refused(tiny, seg_options):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tiny / 'executed'),)

    torch.save(dict(state_dict=Payload()), tiny / 'evil.pth')
    for argv, tool in (
        (['seg.py', 'evil.pth'], test),
        (['seg.py', '--resume', 'evil.pth'], train),
    ):
        with pytest.raises(SystemExit, match='evil.pth'):
            tool.main([*argv, *seg_options])
    assert not (tiny / 'executed').exists()


@pytest.mark.parametrize(
    'config, flags, message',
    [
        ('seg.py', ['--out', 'x', '--out-item', 'pred'], '--out-item'),
        ('cls.py', ['--out', 'x.txt'], 'x.txt: want a file ending in .pkl'),
        ('cls.py', ['--show-dir', 'x', '--tta'], 'does not work with --tta'),
    ],
)
def test_flags_that_mean_nothing_are_refused(tiny, config, flags, message):
    with pytest.raises(SystemExit, match=message):
        test.main([config, 'none.pth', *flags])


def test_outputs_of_another_scope_are_refused(tiny):
    (tiny / 'det.py').write_text("default_scope = 'mmdet'")
    with pytest.raises(SystemExit, match="--out: known for .* has 'mmdet'"):
        test.main(['det.py', 'none.pth', '--out', 'x.pkl'])


def test_amp_says_what_machine_it_needs(tiny, monkeypatch):
    monkeypatch.setattr(train, 'is_cuda_available', lambda: False)
    monkeypatch.setattr(train, 'has_bfloat16', lambda: False)
    with pytest.raises(SystemExit, match='--amp needs a GPU, or a CPU with instructions for bf'):
        train.main(['seg.py', '--amp'])


def test_amp_on_a_cpu_is_bfloat16(tiny, seg_options, monkeypatch):
    """Whose losses are not scaled, whatever the config says."""
    monkeypatch.setattr(train, 'is_cuda_available', lambda: False)
    monkeypatch.setattr(train, 'has_bfloat16', lambda: True)
    (tiny / 'seg.py').write_text(
        SEGMENTOR.replace("type='OptimWrapper'", "type='OptimWrapper', loss_scale=512.0")
    )
    options = [*seg_options, 'optim_wrapper.dtype=bfloat16']
    cfg = train.prepare(train.parse_args(['seg.py', '--amp', *options]))
    assert cfg.optim_wrapper.type == 'BFloat16OptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper


def test_amp_exchanges_the_optimizer_wrapper(tiny, seg_options, monkeypatch):
    monkeypatch.setattr(train, 'is_cuda_available', lambda: True)
    cfg = train.prepare(train.parse_args(['seg.py', '--amp', *seg_options]))
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    (tiny / 'seg.py').write_text(SEGMENTOR.replace("'OptimWrapper'", "'OtherWrapper'"))
    with pytest.raises(ValueError, match='OtherWrapper'):
        train.prepare(train.parse_args(['seg.py', '--amp', *seg_options]))


def test_amp_takes_a_wrapper_that_is_a_class(monkeypatch):
    """As pure-Python configs spell it."""
    monkeypatch.setattr(train, 'is_cuda_available', lambda: True)
    cfg = Config(dict(optim_wrapper=dict(type=OptimWrapper)))
    train.enable_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    with pytest.raises(ValueError, match='the config has ApexOptimWrapper'):
        train.enable_amp(Config(dict(optim_wrapper=dict(type=ApexOptimWrapper))))


@pytest.mark.parametrize('names, refused', [(['backbone'], True), (['decode_head'], False)])
def test_activation_checkpointing_of_a_backbone_is_refused(names, refused):
    cfg = Config(dict(activation_checkpointing=names))
    with pytest.raises(ValueError, match='without gradients') if refused else nullcontext():
        train.check_activation_checkpointing(cfg)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='cannot know the instructions')
@pytest.mark.parametrize(
    'flags, supported, count', [(['--amp'], False, 1), (['--amp'], True, 0), ([], False, 0)]
)
def test_bfloat16_on_a_cpu_without_instructions_for_it_is_named_once(
    tiny, seg_options, monkeypatch, flags, supported, count
):
    said = []
    monkeypatch.setattr('mdeq_mm.optim.get_device', lambda: 'cpu')
    monkeypatch.setattr('mdeq_mm.apis.config.print_log', lambda text, **_: said.append(text))
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: supported)
    torch.save(dict(state_dict={}), 'net.pth')
    test.prepare(test.parse_args(['seg.py', 'net.pth', *flags, *seg_options]))
    assert sum('no instructions for bfloat16' in text for text in said) == count
