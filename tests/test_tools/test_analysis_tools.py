"""tools/analysis_tools: on a tiny network, from Python and from the command line."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.flop_counter import FlopCounterMode

from mdeq_mm.apis import build_model, load_config, load_model
from mdeq_mm.apis.video import Frames, image_batch
from mdeq_mm.deq import Anderson, PreviousStart, Problem
from tools.analysis_tools import (
    accuracy_vs_nfe,
    get_flops,
    inference,
    plot_convergence,
    warm_start,
)

from ..checks import assert_same
from ..mini_datasets import write_cityscapes, write_class_folders

REPO = Path(__file__).resolve().parents[2]
NET = dict(channels=(8, 8), expansion=1, norm_cfg=dict(type='GN', num_groups=4))
SEGMENTOR = f"""
_base_ = ['{REPO}/configs/mdeq_small_cityscapes.py']
model = dict(
    backbone=dict({', '.join(f'{k}={v!r}' for k, v in NET.items())}, solver=dict(max_iter=3)),
    decode_head=dict(in_channels=(8, 8), in_index=(0, 1), channels=16),
)
"""
CLASSIFIER = f"""
_base_ = ['{REPO}/configs/mdeq_tiny_digits.py']
model = dict(
    backbone=dict(
        {', '.join(f'{k}={v!r}' for k, v in NET.items())},
        solver=dict(max_iter=3, jitter=None),
    ),
    neck=[
        dict(type='MDEQFuseNeck', in_channels=(8, 8), head_channels=(4, 4), out_channels=16),
        dict(type='GlobalAveragePooling'),
    ],
    head=dict(in_channels=16),
)
test_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Give a folder with tiny data, configs and an image, as working directory."""
    pytest.importorskip('mmseg')
    pytest.importorskip('mmpretrain')
    write_cityscapes(tmp_path / 'data/cityscapes', size=(32, 48))
    write_class_folders(tmp_path / 'data/digits', dict(train=1, test=1))
    (tmp_path / 'seg.py').write_text(SEGMENTOR)
    (tmp_path / 'cls.py').write_text(CLASSIFIER)
    image = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_checkpoint(config, **meta):
    """Random weights in a checkpoint as MM writes it."""
    torch.manual_seed(0)
    model = build_model(Config.fromfile(config))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), 'random.pth')
    return 'random.pth'


class TestPlotConvergence:
    def test_residuals_are_those_of_the_solver(self, tiny):
        weights = save_checkpoint('cls.py')
        flags = ['--batches', '2', '--nfe', '6', '--out', 'plots/a.png']
        result = plot_convergence.main(['cls.py', weights, *flags])
        assert set(result) == {'Broyden', 'Anderson', 'plain iteration'}
        assert np.shape(result['Broyden']['mean']) == (6, 3)
        assert cv2.imread('plots/a.png').std() > 10
        written = json.loads(Path('plots/a.json').read_text())
        assert written['residuals'] == result
        assert written['shapes'] == [[8, 16, 16], [8, 8, 8]]

        # Only the first batch, by the backbone's own solve.
        cfg = load_config('cls.py')
        cfg.model.backbone.solver.update(type='Anderson', max_iter=4, tol=0, memory=10)
        model = load_model(cfg, weights, 'cpu')
        loader = Runner.build_dataloader(cfg.test_dataloader, seed=0)
        model.test_step(next(iter(loader)))
        best = model.backbone.implicit.forward_stats.residual.mean()
        one = plot_convergence.main(['cls.py', weights, '--batches', '1', '--nfe', '4'])['Anderson']
        assert one['mean'] == one['low'] == one['high']
        assert best.item() == pytest.approx(min(row[0] for row in one['mean']), rel=1e-4)

    def test_scales_add_up_to_the_whole(self):
        class Doubled(Problem):
            start, shapes = torch.tensor([[0.0, 0, 0, 0, 1]]), [(1, 2, 2), (1, 1, 1)]

            def __call__(self, z):
                return 2 * z + 1

        rows, _ = plot_convergence.residuals(Doubled(), Anderson(max_iter=1))
        # f(z) - z = (1 1 1 1 | 2), f(z) = (1 1 1 1 | 3)
        wanted = [(8 / 13) ** 0.5, 1, 2 / 3]
        assert rows[0].tolist() == pytest.approx(wanted)

    def test_segmentation_with_random_weights(self, tiny):
        options = ['--cfg-options', 'test_dataloader.num_workers=0']
        result = plot_convergence.main(['seg.py', '--batches', '1', '--nfe', '3', *options])
        assert np.isfinite(result['plain iteration']['mean']).all()
        assert Path('work_dirs/convergence.png').is_file()

    def test_wrong_arguments_are_one_line(self, tiny, capsys):
        with pytest.raises(SystemExit, match='no.py does not exist'):
            plot_convergence.main(['no.py'])
        with pytest.raises(SystemExit):
            plot_convergence.main(['cls.py', '--nfe', '0'])
        assert 'at least 1' in capsys.readouterr().err


class TestAccuracyVsNFE:
    def test_each_row_is_a_test_at_that_many_calls(self, tiny):
        weights = save_checkpoint('seg.py')
        flags = ['--nfe', '1', '5', '--out', 'plots/a.png']
        options = ['test_dataloader.num_workers=0', 'model.backbone.solver.tol=0']
        rows = accuracy_vs_nfe.main(['seg.py', weights, *flags, '--cfg-options', *options])
        assert [row['nfe'] for row in rows] == [row['deq_nfe'] for row in rows] == [1, 5]
        assert rows[1]['deq_residual'] < rows[0]['deq_residual']
        assert 'mIoU' in rows[0] and cv2.imread('plots/a.png').std() > 10
        assert json.loads(Path('plots/a.json').read_text()) == rows

    def test_wrong_arguments_are_one_line(self, tiny, capsys):
        weights = save_checkpoint('seg.py')
        with pytest.raises(SystemExit):
            accuracy_vs_nfe.main(['seg.py', weights, '--nfe', '0'])
        assert 'must be at least 1' in capsys.readouterr().err
        for config, options, words in (
            ('no.py', [], 'no.py does not exist'),
            ('seg.py', ['model.backbone.unrolled_layers=2'], 'unrolls 2 layers'),
        ):
            flags = ['--nfe', '1', '--cfg-options', 'test_dataloader.num_workers=0', *options]
            with pytest.raises(SystemExit, match=words):
                accuracy_vs_nfe.main([config, weights, *flags])


class TestInference:
    @pytest.mark.parametrize('config', ['cls.py', 'seg.py'])
    @pytest.mark.parametrize('flags', [[], ['--equilibrium', '2']], ids=['plain', 'equilibrium'])
    def test_paints(self, tiny, capsys, config, flags):
        weights = save_checkpoint(config)
        inference.main(['image.png', config, weights, '--out', 'out/a.png', *flags])
        out = capsys.readouterr().out
        painted = cv2.imread('out/a.png')
        assert painted.std() > 10 and out.splitlines()[-1] == 'out/a.png'
        if config == 'cls.py':
            scores = [float(line.split()[0]) for line in out.splitlines()[-6:-1]]
            assert scores == sorted(scores, reverse=True)
        elif not flags:
            assert painted.shape == (32, 48, 3)

    def test_calls_are_those_that_were_asked_for(self, tiny):
        cfg = Config.fromfile('cls.py')
        model = load_model(cfg, save_checkpoint('cls.py'), 'cpu')
        data = image_batch(cfg, inference.read_image('image.png'), 'image.png')
        calls = []
        model.backbone.cell.register_forward_hook(lambda *_: calls.append(1))
        found = inference.predict_by_calls(model, data, 0)
        # 1, 2, 3 calls of the solver, and after each solve one more.
        assert len(found) == 3 and len(calls) == 1 + 2 + 3 + 3
        assert found[0][1] == pytest.approx(1)
        last = inference.predict(model, data).pred_score
        assert_same(found[-1][0].pred_score, last)
        # The model is as it was.
        assert model.backbone.implicit.eval_solver is None and len(calls) == 1 + 2 + 3 + 3 + 4
        assert not torch.equal(found[0][0].pred_score, last)

    def test_every_prediction_begins_from_zeros(self, tiny):
        """Also by a model whose solves begin at the last equilibrium."""
        cfg = Config.fromfile('cls.py')
        model = load_model(cfg, save_checkpoint('cls.py'), 'cpu')
        data = image_batch(cfg, inference.read_image('image.png'), 'image.png')
        wanted = inference.predict_by_calls(model, data, 3)
        model.backbone.implicit.start = PreviousStart()
        got = inference.predict_by_calls(model, data, 3)
        for (sample, residual), (other, other_residual) in zip(got, wanted, strict=True):
            assert_same(sample.pred_score, other.pred_score)
            assert residual == other_residual

    def test_class_names_come_from_the_checkpoint(self, tiny, capsys):
        names = [f'digit {i}' for i in range(10)]
        weights = save_checkpoint('cls.py', dataset_meta=dict(classes=names))
        inference.main(['image.png', 'cls.py', weights])
        assert 'digit' in capsys.readouterr().out

    def test_classes_without_names_or_colours_are_painted(self, tiny):
        cfg = Config.fromfile('seg.py')
        model = load_model(cfg, save_checkpoint('seg.py'), 'cpu')
        assert model.dataset_meta['classes'][0] == 'road'
        image = inference.read_image('image.png')
        sample = inference.predict(model, image_batch(cfg, image, 'image.png'))
        model.dataset_meta = {}
        first, again = (inference.overlay(model, image, sample, 0.5, True) for _ in range(2))
        assert np.array_equal(first, again) and not np.array_equal(first, image)

    def test_an_array_data_set_has_its_colours_as_rgb(self, tiny):
        cfg = Config.fromfile(REPO / 'configs/mdeq_tiny_cifar10.py')
        init_default_scope(cfg.default_scope)
        image = inference.read_image('image.png')
        inputs = image_batch(cfg, image, 'image.png')['inputs'][0]
        assert np.array_equal(inputs.permute(1, 2, 0).numpy(), image)

    @pytest.mark.parametrize('kind', ['ConcatDataset', 'RepeatDataset'])
    def test_a_data_set_inside_another_says_how_an_image_is_prepared(self, tiny, kind):
        cfg = load_config('seg.py')
        inner = cfg.test_dataloader.dataset
        inner = dict(datasets=[inner]) if kind == 'ConcatDataset' else dict(dataset=inner, times=2)
        cfg.test_dataloader.dataset = dict(type=kind, **inner)
        cfg.dump('wrapped.py')
        flags = ['--out', 'a.png', '--device', 'cpu']
        inference.main(['image.png', 'wrapped.py', save_checkpoint('seg.py'), *flags])
        assert cv2.imread('a.png') is not None
        assert load_model(cfg, None, 'cpu').dataset_meta['classes'][0] == 'road'

    def test_data_to_validate_with_say_it_where_there_are_none_to_test(self, tiny):
        cfg = load_config('seg.py')
        image = inference.read_image('image.png')
        init_default_scope(cfg.default_scope)
        want = image_batch(cfg, image, 'image.png')['inputs'][0]
        cfg.test_dataloader = None
        assert torch.equal(image_batch(cfg, image, 'image.png')['inputs'][0], want)
        cfg.val_dataloader = None
        cfg.dump('nothing.py')
        with pytest.raises(SystemExit, match='no test_dataloader or val_dataloader'):
            inference.main(['image.png', 'nothing.py', save_checkpoint('seg.py')])

    def test_a_frame_is_grey_where_the_files_are_read_so(self, tiny):
        cfg = load_config('seg.py')
        init_default_scope(cfg.default_scope)
        cfg.test_dataloader.dataset.pipeline[0].color_type = 'grayscale'
        image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        cv2.imwrite('colours.png', image[..., ::-1])
        want = image_batch(cfg, image, 'colours.png')['inputs'][0].int()
        got = image_batch(cfg, image)['inputs'][0].int()
        # A decoder rounds differently.
        assert want.shape == got.shape == (1, 32, 48) and (got - want).abs().max() <= 1

    def test_weights_of_another_config_are_refused(self, tiny):
        weights = save_checkpoint('cls.py')
        config = str(REPO / 'configs/mdeq_tiny_digits.py')
        with pytest.raises(SystemExit, match='does not fit this config'):
            inference.main(['image.png', config, weights])

    def test_missing_image(self, tiny):
        with pytest.raises(SystemExit, match='none.png does not exist'):
            inference.main(['none.png', 'cls.py', 'random.pth'])


def write_frames(sizes):
    """A folder of frames, each a window on one image that moves by a pixel; shapes (H, W)."""
    folder = Path('frames')
    folder.mkdir()
    image = np.indices((48, 96)).sum(0)[..., None].repeat(3, axis=2)
    for i, (height, width) in enumerate(sizes):
        frame = image[:height, i : i + width].astype(np.uint8)
        cv2.imwrite(str(folder / f'{i:03}.png'), frame)
    return str(folder)


def read_video(path):
    return list(Frames(str(path)))


class TestStreams:
    @pytest.mark.parametrize('config', ['cls.py', 'seg.py'])
    def test_every_frame_is_painted_and_its_calls_are_printed(self, tiny, capsys, config):
        folder = write_frames([(32, 48)] * 3)
        inference.main([folder, config, save_checkpoint(config), '--out', 'out/a.mp4'])
        out = capsys.readouterr().out
        assert out.count('calls of f\n') == 3 and '3 frames, 3.0 calls of f a frame' in out
        assert out.splitlines()[-1] == str(Path('out/a.mp4'))
        painted = read_video('out/a.mp4')
        assert [frame.shape for frame in painted] == [(32, 48, 3)] * 3
        # A video is read like a folder.
        inference.main(['out/a.mp4', config, 'random.pth', '--out', 'out/b.avi'])
        assert len(read_video('out/b.avi')) == 3

    @pytest.mark.parametrize('opacity', [0.0, 1.0])
    def test_a_painted_frame_has_the_colours_of_the_frame_and_of_its_classes(self, tiny, opacity):
        """In the order of OpenCV: BGR."""
        cfg = Config.fromfile('seg.py')
        model = load_model(cfg, save_checkpoint('seg.py'), 'cpu')
        frame = np.zeros((32, 48, 3), np.uint8)
        frame[:] = (200, 100, 0)
        sample = inference.predict(model, image_batch(cfg, frame[..., ::-1]))
        # Of Cityscapes' colours, RGB, that of a car.
        sample.pred_sem_seg.data[:] = model.dataset_meta['classes'].index('car')
        painted = inference.paint_frame(model, frame, sample, opacity)
        wanted = (0, 0, 142)[::-1] if opacity else (200, 100, 0)
        assert np.unique(painted.reshape(-1, 3), axis=0).tolist() == [list(wanted)]

    def test_a_batch_of_a_frame_is_that_of_its_file(self, tiny):
        cfg = load_config('seg.py')
        init_default_scope(cfg.default_scope)
        image = inference.read_image('image.png')
        want = image_batch(cfg, image, 'image.png')['inputs'][0]
        got = image_batch(cfg, cv2.imread('image.png')[..., ::-1])['inputs'][0]
        assert_same(got, want)

    def test_a_warm_start_spends_fewer_calls_on_a_still_image(self, tiny, capsys):
        folder = write_frames([(32, 48)])
        first = Path(folder, '000.png')
        for i in (1, 2):
            shutil.copy(first, Path(folder, f'{i:03}.png'))
        options = ['max_iter=60', 'tol=0.5']
        options = [f'model.backbone.solver.{option}' for option in options]
        flags = [folder, 'seg.py', save_checkpoint('seg.py')]
        calls = []
        for extra in ([], ['--warm-start']):
            inference.main([*flags, *extra, '--cfg-options', *options])
            found = re.findall(r'frame \d of 3: (\d+) calls', capsys.readouterr().out)
            calls.append(list(map(int, found)))
        cold, warm = calls
        assert cold[0] == cold[1] == cold[2] == warm[0] > 1
        assert warm[1:] == [1, 1]

    def test_frames_of_another_size_begin_anew(self, tiny, capsys):
        folder = write_frames([(32, 48), (32, 48), (32, 64)])
        weights = save_checkpoint('seg.py')
        inference.main([folder, 'seg.py', weights, '--warm-start', '--out', 'a.mp4'])
        assert capsys.readouterr().out.splitlines()[-2:] == ['a.mp4', 'a_2.mp4']
        assert len(read_video('a.mp4')) == 2
        assert [frame.shape for frame in read_video('a_2.mp4')] == [(32, 64, 3)]

    def test_an_interrupt_leaves_a_video_that_plays(self, tiny, capsys, monkeypatch):
        folder = write_frames([(32, 48)] * 3)
        predict, seen = inference.predict, []

        def interrupted(*arguments):
            seen.append(1)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return predict(*arguments)

        monkeypatch.setattr(inference, 'predict', interrupted)
        inference.main([folder, 'seg.py', save_checkpoint('seg.py'), '--out', 'a.mp4'])
        assert len(read_video('a.mp4')) == 2
        assert 'interrupted' in capsys.readouterr().out

    def test_what_cannot_be_read_or_done_is_said_at_once(self, tiny, capsys):
        folder = write_frames([(32, 48)])
        Path('broken.mp4').write_bytes(b'no video')
        Path('empty').mkdir()
        slide = ['--cfg-options', 'model.test_cfg.mode=slide']
        weights = save_checkpoint('seg.py')
        for source, flags, words in (
            ('broken.mp4', [], 'not a video that OpenCV can read'),
            ('none.mp4', [], 'video none.mp4 does not exist'),
            ('empty', [], 'has no images'),
            (folder, ['--out', 'a.gif'], 'written as .avi or .mp4'),
            (folder, ['--warm-start', *slide], 'slides a window'),
        ):
            with pytest.raises(SystemExit, match=words):
                inference.main([source, 'seg.py', weights, *flags])
        for source, flag in (('image.png', '--warm-start'), (folder, '--equilibrium')):
            with pytest.raises(SystemExit):
                inference.main([source, 'seg.py', weights, flag])
            assert flag in capsys.readouterr().err


class TestWarmStart:
    def test_a_pan_that_stands_still_takes_one_call(self, tiny):
        folder = write_frames([(48, 80)])
        flags = ['--frames', '3', '--window', '32', '48', '--pixels', '0', '2', '--tol', '0.5']
        rows = warm_start.main(['seg.py', save_checkpoint('seg.py'), folder, *flags])
        assert [(row['pixels'], row['start']) for row in rows] == [
            (pixels, start) for pixels in (0, 2) for start in ('equilibrium', 'history', 'motion')
        ]
        for still in rows[:3]:
            assert still['warm'] == 1 and still['cold'] > 1 and still['equal'] == 1
            assert still['cold_exact'] == still['warm_exact'] < 1
        assert all(moving['warm'] <= moving['cold'] for moving in rows[3:])
        assert json.loads(Path('work_dirs/warm_start.json').read_text()) == rows

    def test_means_leave_out_the_first_frame_which_both_solve_alike(self):
        def pan(*frames):
            return [(calls, torch.tensor(labels)) for calls, labels in frames]

        cold = [pan((9, [0, 0]), (8, [1, 1]), (6, [1, 1])), pan((9, [0, 0]), (4, [2, 2]))]
        warm = [pan((9, [5, 5]), (2, [1, 0]), (4, [1, 1])), pan((9, [5, 5]), (6, [2, 2]))]
        exact = [pan((9, [7, 7]), (9, [1, 0]), (9, [0, 0])), pan((9, [7, 7]), (9, [2, 2]))]
        assert warm_start.compare(cold, warm, exact) == pytest.approx(
            dict(
                cold=(8 + 6 + 4) / 3,
                warm=(2 + 4 + 6) / 3,
                ratio=12 / 18,
                # The mean of each pan's share: of frames, then of pans.
                equal=(0.75 + 1) / 2,
                cold_exact=(0.25 + 1) / 2,
                warm_exact=(0.5 + 1) / 2,
            )
        )

    def test_what_is_exact_has_a_tenth_of_the_least_tolerance_and_more_calls(
        self, tiny, monkeypatch
    ):
        solvers = []

        def solve_pan(model, batches, start):
            solvers.append((model.backbone.implicit.eval_solver, start))
            return [(1, torch.zeros(2, 2))] * len(batches)

        monkeypatch.setattr(warm_start, 'solve_pan', solve_pan)
        flags = ['--frames', '2', '--window', '32', '48', '--pixels', '1']
        flags += ['--tol', '0.5', '0.1', '--max-iter', '7']
        flags += ['--cfg-options', 'model.backbone.solver.memory=3']
        weights, folder = save_checkpoint('seg.py'), write_frames([(48, 80)])
        warm_start.main(['seg.py', weights, folder, *flags])
        found = [(solver.tol, solver.max_iter, repr(start)) for solver, start in solvers]
        starts = [
            'ZeroStart()',
            'PreviousStart(history=False, motion=0)',
            'PreviousStart(history=True, motion=0)',
            'PreviousStart(history=True, motion=2)',
        ]
        wanted = [(tol, 7, start) for tol in (0.5, 0.1) for start in starts]
        assert found == [(pytest.approx(0.01), 100, 'ZeroStart()'), *wanted]
        assert {solver.memory for solver, _ in solvers} == {3}

    def test_a_solver_that_cannot_be(self, tiny):
        folder, weights = write_frames([(48, 80)]), save_checkpoint('seg.py')
        flags = ['--frames', '2', '--window', '32', '48', '--pixels', '1']
        for wrong in (['--tol', '0.1', '-1'], ['--max-iter', '0']):
            with pytest.raises(SystemExit, match=r'warm_start\.py: .* must be .*got (-1|0)'):
                warm_start.main(['seg.py', weights, folder, *flags, *wrong])

    def test_a_budget_that_varies_in_training(self, tiny):
        folder, weights = write_frames([(48, 80)]), save_checkpoint('seg.py')
        flags = ['--frames', '2', '--window', '32', '48', '--pixels', '0', '--tol', '0']
        flags += ['--max-iter', '3', '--cfg-options', 'model.backbone.solver.jitter=(1,9)']
        rows = warm_start.main(['seg.py', weights, folder, *flags])
        assert {(row['cold'], row['warm']) for row in rows} == {(3, 3)}

    def test_a_window_that_leaves_the_image(self, tiny):
        folder = write_frames([(48, 80)])
        flags = ['--frames', '30', '--window', '32', '48', '--pixels', '2']
        with pytest.raises(SystemExit, match='30 frames of 32x48 by 2 pixels'):
            warm_start.main(['seg.py', save_checkpoint('seg.py'), folder, *flags])


class TestGetFlops:
    def test_counts_are_those_of_the_layers(self, tiny):
        cost = get_flops.main(['cls.py', '--shape', '16', '16'])
        # Stem: two 3x3 convolutions at 16x16; this small net has no injection layer.
        assert cost.stem[1] == 2 * 256 * 9 * (3 * 8 + 8 * 8)
        full, half = 256, 64
        blocks = (full + half) * 2 * (9 * 8 * 8)
        # One stride-2 3x3 down and one 1x1 up (both at half size), a 1x1 at the end of each.
        fusion = half * 9 * 64 + half * 64 + (full + half) * 64
        assert cost.evaluation[1] == 2 * (blocks + fusion)
        assert cost.state == 8 * (full + half) and cost.nfe == 4
        # Three evaluations remember one pair; the step is counted as well.
        assert cost.history == pytest.approx(3 * 4 * cost.state, rel=1e-2)
        parameters = sum(p.numel() for p in build_model(Config.fromfile('cls.py')).parameters())
        assert cost.total[0] == parameters
        assert cost.total[1] == cost.stem[1] + 4 * cost.evaluation[1] + cost.head[1]

    @pytest.mark.parametrize(
        'gradient',
        [
            dict(type='ImplicitGradient', solver=dict(type='Anderson')),
            dict(type='JacobianFreeGradient'),
            dict(type='PhantomGradient', steps=3),
        ],
        ids=lambda gradient: gradient['type'],
    )
    def test_agrees_with_a_count_of_the_real_forward(self, tiny, gradient):
        """No gradient costs anything if none is needed."""
        options = ['--cfg-options', 'model.backbone.solver.tol=0']
        cost = get_flops.main(['seg.py', '--shape', '32', '64', *options])
        cfg = Config.fromfile('seg.py')
        cfg.model.backbone.solver.update(type='FixedPointIteration', tol=0)
        cfg.model.backbone.solver.pop('memory')
        cfg.model.backbone.gradient = gradient
        model = build_model(cfg)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.rand(1, 3, 32, 64), mode='tensor')
        assert counter.get_total_flops() == cost.total[1]

    def test_auxiliary_heads_which_only_training_has_are_left_out(self, tiny):
        cfg = Config.fromfile('seg.py')
        costs = []
        for extra in ({}, dict(auxiliary_head=cfg.model.decode_head)):
            cfg.model.update(extra)
            with torch.device('meta'):
                costs.append(get_flops.count(build_model(cfg), (32, 64)))
        assert costs[0] == costs[1]

    def test_default_shape_and_unrolled_nets(self, tiny, capsys):
        options = ['--cfg-options', 'model.backbone.unrolled_layers=5', 'crop_size=(32,64)']
        assert get_flops.main(['seg.py', *options]).nfe == 5
        assert 'one image of 32 x 64' in capsys.readouterr().out

    def test_a_model_without_mdeq(self, tiny):
        pytest.importorskip('torchdiffeq')
        with pytest.raises(SystemExit, match='0 MDEQBackbone'):
            get_flops.main([str(REPO / 'configs/node_cifar10.py')])
