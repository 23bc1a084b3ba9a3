"""Supervision at several scales, and two tasks on one equilibrium (paper, §3.2)."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope, init_default_scope
from mmengine.structures import BaseDataElement, PixelData

import mdeq_mm  # noqa: F401
from mdeq_mm.models import PresentClasses
from tools import test, train
from tools.dataset_converters import digit_scenes

from .checks import assert_nonzero, assert_same, grads

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = (8, 8, 8)
SOLVER = dict(type='FixedPointIteration', max_iter=4, tol=1e-3)
BACKBONE = dict(
    type='MDEQBackbone',
    channels=CHANNELS,
    expansion=1,
    norm_cfg=dict(type='GN', num_groups=4),
    solver=SOLVER,
    gradient=dict(type='ImplicitGradient', solver=SOLVER),
)


@pytest.fixture
def mmseg_scope():
    mmseg = pytest.importorskip('mmseg')
    init_default_scope('mmseg')
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield mmseg


def fcn_head(in_index, weight=1.0, **kwargs):
    return dict(
        type='FCNHead',
        in_channels=CHANNELS if isinstance(in_index, tuple) else CHANNELS[in_index],
        in_index=in_index,
        channels=8,
        kernel_size=1,
        num_convs=1,
        concat_input=False,
        num_classes=4,
        norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=weight),
        **kwargs,
    )


def segmentor(auxiliary_head):
    torch.manual_seed(0)
    cfg = dict(
        type='EncoderDecoder',
        backbone=BACKBONE,
        decode_head=fcn_head((0, 1, 2), input_transform='resize_concat'),
        auxiliary_head=auxiliary_head,
        test_cfg=dict(mode='whole'),
    )
    return MODELS.build(cfg)


def samples(number=2, size=32):
    from mmseg.structures import SegDataSample

    maps = [torch.randint(0, 4, (1, size, size)) for _ in range(number)]
    return [SegDataSample(gt_sem_seg=PixelData(data=labels)) for labels in maps]


def test_an_auxiliary_head_supervises_the_lowest_scale(mmseg_scope):
    model = segmentor(fcn_head(2, weight=0.4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    losses = model(torch.randn(2, 3, 32, 32), samples(), mode='loss')
    assert losses['decode.loss_ce'] > 0 and losses['aux.loss_ce'] > 0
    total, _ = model.parse_losses(losses)
    total.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize('scale', range(3))
def test_the_loss_of_one_scale_alone_reaches_every_scale_of_the_cell(mmseg_scope, scale):
    """The equilibrium is joint: every scale's supervision trains all the others' weights."""
    model = segmentor([fcn_head(i) for i in range(3)])
    losses = model(torch.randn(2, 3, 32, 32), samples(), mode='loss')
    assert {f'aux_{i}.loss_ce' for i in range(3)} < losses.keys()
    losses[f'aux_{scale}.loss_ce'].backward()
    assert_nonzero(grads(model.backbone))


def packed(labels):
    sample = BaseDataElement()
    sample.set_data(dict(gt_sem_seg=PixelData(data=torch.tensor(labels, dtype=torch.uint8)[None])))
    return dict(data_samples=sample)


def test_present_classes_are_those_of_the_map():
    transform = TRANSFORMS.build(dict(type='PresentClasses', num_classes=4))
    score = transform(packed([[3, 3, 0], [4, 255, 0]]))['data_samples'].gt_score
    assert score.tolist() == [1, 0, 0, 1]
    assert transform(packed([[4, 255]]))['data_samples'].gt_score.tolist() == [0, 0, 0, 0]


def test_present_classes_says_where_it_belongs():
    with pytest.raises(ValueError, match='after PackSegInputs'):
        PresentClasses(num_classes=4)(dict(img=None))


def joint_model(**backbone):
    cfg = Config.fromfile(ROOT / 'configs/mdeq_demo_multitask.py')
    for name, value in backbone.items():
        cfg.model.backbone[name] = value
    pytest.importorskip('mmpretrain')
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


def joint_samples(shapes, padded=32):
    """Samples whose images have these shapes, padded to a square at the bottom and right."""
    result = []
    for index, (rows, columns) in enumerate(shapes):
        meta = dict(img_shape=(rows, columns), ori_shape=(2 * rows, 2 * columns))
        sample = samples(1, padded)[0]
        sample.set_metainfo(dict(meta, pad_shape=(padded, padded)))
        sample.set_data(dict(gt_score=torch.eye(10)[index]))
        result.append(sample)
    return result


def test_joint_head_sends_both_losses_through_one_equilibrium(mmseg_scope):
    model = joint_model(solver=SOLVER, gradient=dict(type='ImplicitGradient', solver=SOLVER))
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    losses = model(torch.randn(2, 3, 32, 32), joint_samples([(32, 32)] * 2), mode='loss')
    assert losses['seg.loss_ce'] > 0 and losses['cls.loss'] > 0
    assert len(calls) == 1
    parameters = list(model.backbone.parameters())
    for name in ('seg.loss_ce', 'cls.loss'):
        found = torch.autograd.grad(losses[name], parameters, retain_graph=True)
        assert all(grad.any() for grad in found)
    total, log = model.parse_losses(losses)
    assert log['loss'].item() == pytest.approx(
        losses['seg.loss_ce'].item() + losses['cls.loss'].item(), rel=1e-5
    )
    total.backward()
    assert [name for name, grad in grads(model).items() if grad is None] == []


def test_joint_head_predicts_what_its_two_heads_do(mmseg_scope):
    """Maps lose the padding and take the size the image was read with."""
    model = joint_model(solver=SOLVER).eval()
    images = torch.randn(2, 3, 32, 32)
    predicted = model(images, joint_samples([(32, 32), (20, 28)]), mode='predict')
    with torch.no_grad():
        maps, scores = model(images, mode='tensor')
    assert [tuple(s.pred_sem_seg.data.shape) for s in predicted] == [(1, 64, 64), (1, 40, 56)]
    for sample, score in zip(predicted, scores.sigmoid()):
        torch.testing.assert_close(sample.pred_score, score)
        assert sample.pred_label.tolist() == torch.where(score >= 0.5)[0].tolist()
    resize = dict(mode='bilinear', align_corners=True)
    expected = torch.nn.functional.interpolate(maps, size=(32, 32), **resize)[1:, :, :20, :28]
    expected = torch.nn.functional.interpolate(expected, size=(40, 56), **resize).argmax(1)
    assert_same(predicted[1].pred_sem_seg.data, expected)


def test_joint_head_wants_samples_to_predict(mmseg_scope):
    model = joint_model(solver=SOLVER).eval()
    with pytest.raises(ValueError, match="mode='tensor'"):
        model(torch.randn(1, 3, 32, 32), mode='predict')


def test_training_reports_the_metrics_of_both_tasks(tmp_path):
    pytest.importorskip('mmseg')
    pytest.importorskip('mmpretrain')
    scenes = tmp_path / 'digit_scenes'
    digit_scenes.build(scenes, num_train=8, num_val=4, size=64)
    options = [
        f'data_root={scenes}',
        'crop_size=(64,64)',
        'model.backbone.channels=(8,8)',
        'model.backbone.norm_cfg.num_groups=4',
        'model.head.seg.in_channels=(8,8)',
        'model.head.seg.in_index=(0,1)',
        'model.head.cls_neck.0.in_channels=(8,8)',
        'model.head.cls_neck.0.head_channels=(4,4)',
        'model.backbone.solver.max_iter=3',
        'model.backbone.solver.jitter=(2,4)',
        'default_hooks.warmup.unrolled_iters=2',
        'default_hooks.warmup.softplus_iters=2',
        'train_dataloader.batch_size=4',
        'train_cfg.max_iters=4',
        'train_cfg.val_interval=4',
        'default_hooks.logger.interval=1',
        *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
    ]
    config = str(ROOT / 'configs/mdeq_demo_multitask.py')
    flags = ['--work-dir', str(tmp_path / 'work'), '--cfg-options', *options]
    runner = train.main([config, *flags])
    scalars = runner.message_hub.log_scalars
    for name in ('train/seg.loss_ce', 'train/cls.loss'):
        losses, _ = scalars[name].data
        assert len(losses) == 4 and (losses > 0).all()
    evaluation = {
        name: scalars[f'val/{name}'].current()
        for name in ('mIoU', 'multi-label/mAP', 'multi-label/f1-score', 'val/deq_nfe')
    }
    assert all(0 <= value <= 100 for value in evaluation.values())
    assert evaluation['val/deq_nfe'] == 3

    _, metrics = test.main([config, str(tmp_path / 'work/iter_4.pth'), *flags])
    for name in ('mIoU', 'multi-label/mAP'):
        assert metrics[name] == pytest.approx(evaluation[name], abs=0.01)
