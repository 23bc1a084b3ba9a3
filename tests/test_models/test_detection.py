"""The backbone in mmdetection: what configs/mdeq_small_fpn_coco.py makes, and two rounds of it."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner

import mdeq_mm  # noqa: F401

CONFIG = Path(__file__).resolve().parents[2] / 'configs/mdeq_small_fpn_coco.py'
STRIDES = [4, 8, 16, 32]


def config():
    """The config with its widths cut down; its structure stays."""
    cfg = Config.fromfile(CONFIG)
    channels = [8, 16, 24, 32]
    solver = dict(max_iter=3)
    cfg.merge_from_dict(
        dict(
            model=dict(
                backbone=dict(
                    channels=channels, expansion=1, solver=solver, gradient=dict(solver=solver)
                ),
                neck=dict(in_channels=channels, out_channels=16),
                rpn_head=dict(in_channels=16, feat_channels=16),
                roi_head=dict(
                    bbox_roi_extractor=dict(out_channels=16),
                    bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=3),
                ),
                test_cfg=dict(rcnn=dict(score_thr=0.0)),
            )
        )
    )
    return cfg


def test_anchors_and_boxes_have_the_strides_of_the_maps_they_read():
    model = Config.fromfile(CONFIG).model
    with torch.device('meta'):
        backbone = MODELS.build(dict(model.backbone, stem_norm_cfg=dict(type='BN')))
    cfg = dict(config().model.backbone, stem_norm_cfg=dict(type='BN'))
    with torch.no_grad():
        maps = MODELS.build(cfg)(torch.zeros(1, 3, 64, 96))
    assert [64 // m.shape[2] for m in maps] == [96 // m.shape[3] for m in maps] == STRIDES
    assert list(backbone.channels) == list(model.neck.in_channels)
    assert model.rpn_head.anchor_generator.strides == [*STRIDES, 64]
    assert model.roi_head.bbox_roi_extractor.featmap_strides == STRIDES
    # All maps are resized by whole strides, so padding must be to the coarsest of them.
    assert model.data_preprocessor.pad_size_divisor % STRIDES[-1] == 0


@pytest.fixture
def mmdet():
    """mmdetection and the operators it needs: where they are missing it cannot be imported."""
    module = pytest.importorskip('mmdet')
    pytest.importorskip('mmcv._ext', reason='mmdet needs mmcv with compiled operators')
    before = DefaultScope.get_current_instance()
    init_default_scope('mmdet')
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield module
    if before is not None:
        init_default_scope(before.scope_name)


def test_the_published_widths_build(mmdet):
    with torch.device('meta'):
        model = MODELS.build(Config.fromfile(CONFIG).model)
    assert type(model).__name__ == 'FasterRCNN'
    lateral = [conv.conv.in_channels for conv in model.neck.lateral_convs]
    assert lateral == [32, 64, 128, 256]
    assert sum(p.numel() for p in model.backbone.parameters()) == 8727488


def samples(count=2):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    generator = torch.Generator().manual_seed(0)
    inputs, found = [], []
    for _ in range(count):
        # Neither side a multiple of 32: the preprocessor pads.
        inputs.append(torch.randint(0, 256, (3, 70, 90), generator=generator, dtype=torch.uint8))
        sample = DetDataSample(
            metainfo=dict(img_shape=(70, 90), ori_shape=(70, 90), scale_factor=(1.0, 1.0), img_id=0)
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[5.0, 5.0, 40.0, 45.0], [30.0, 10.0, 80.0, 60.0]]),
            labels=torch.tensor([0, 2]),
        )
        found.append(sample)
    return dict(inputs=inputs, data_samples=found)


def test_losses_reach_every_scale_and_boxes_come_out(mmdet):
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config().model))
    model.init_weights()
    data = model.data_preprocessor(samples(), training=True)
    assert data['inputs'].shape[-2:] == (96, 96)
    losses = model(**data, mode='loss')
    total, _ = model.parse_losses(losses)
    assert {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox'} <= losses.keys()
    total.backward()
    for lateral in model.neck.lateral_convs:
        assert lateral.conv.weight.grad.abs().sum() > 0
    without = [n for n, p in model.backbone.named_parameters() if p.grad is None]
    assert not without and torch.isfinite(total)
    assert model.backbone.stem[0].conv.weight.grad.abs().sum() > 0

    model.eval()
    data = model.data_preprocessor(samples(), training=False)
    with torch.no_grad():
        results = model(**data, mode='predict')
    for result in results:
        boxes = result.pred_instances.bboxes
        assert len(boxes) and boxes.shape[1] == 4 and torch.isfinite(boxes).all()
        assert boxes.min() >= 0 and boxes[:, 0::2].max() <= 90 and boxes[:, 1::2].max() <= 70


def write_coco(root, splits):
    """Miniature COCO: grey images with one bright box each."""
    (root / 'annotations').mkdir(parents=True)
    for split, count in splits.items():
        (root / split).mkdir()
        images, boxes = [], []
        for i in range(count):
            image = np.full((64, 80, 3), 60, np.uint8)
            image[10:50, 8 * i + 4 : 8 * i + 44] = 220
            cv2.imwrite(str(root / split / f'{i}.png'), image)
            images.append(dict(id=i, file_name=f'{i}.png', width=80, height=64))
            box = [8 * i + 4, 10, 40, 40]
            boxes.append(dict(id=i, image_id=i, category_id=1, bbox=box, area=1600, iscrowd=0))
        content = dict(images=images, annotations=boxes, categories=[dict(id=1, name='person')])
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(content))


def test_the_config_trains_and_validates(mmdet, tmp_path):
    write_coco(tmp_path / 'coco', dict(train2017=2, val2017=1))
    cfg = config()
    root = str(tmp_path / 'coco') + '/'
    for part in ('train', 'val', 'test'):
        loader = cfg[f'{part}_dataloader']
        loader.num_workers, loader.persistent_workers = 0, False
        loader.dataset.data_root = root
        loader.dataset.metainfo = dict(classes=('person',))
        for step in loader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = (96, 64)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = root + 'annotations/instances_val2017.json'
    cfg.model.roi_head.bbox_head.num_classes = 1
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.warmup.update(unrolled_iters=0, softplus_iters=0)
    cfg.default_hooks.solver_stats.interval = 1
    cfg.model.backbone.stem_norm_cfg = dict(type='BN')
    cfg.work_dir = str(tmp_path / 'work')
    cfg.experiment_name = f'detection_{tmp_path.name}'
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert 'val/coco/bbox_mAP' in runner.message_hub.log_scalars
    assert runner.message_hub.get_scalar('train/train/deq_nfe').current() == 3
    assert runner.message_hub.get_scalar('val/val/deq_nfe').current() == 3
    saved = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=True)
    assert any(name.startswith('backbone.cell') for name in saved['state_dict'])
