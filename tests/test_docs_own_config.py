"""Snippets "in your own config" of README.md and docs/extend.md, over shipped configs."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import mdeq_mm  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    ('README.md', 'mmseg'): (
        'fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        'deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    ),
    ('docs/extend.md', 'mmseg'): (
        'upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py',
        'segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
        'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    ),
    ('README.md', 'mmpretrain'): (
        'resnet/resnet18_8xb32_in1k.py',
        'resnet/resnet50_8xb32_in1k.py',
        'resnext/resnext50-32x4d_8xb32_in1k.py',
    ),
    ('README.md', 'mmdet'): (
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        'retinanet/retinanet_r50_fpn_1x_coco.py',
    ),
}


def snippet(page, project):
    """The page's snippet for configs of a project, without its own ``_base_``."""
    codes = re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), flags=re.DOTALL)
    (code,) = [code for code in codes if f'{project}::' in code]
    return re.sub(r'^_base_ = .*\n', '', code)


def forward(model, project, image):
    """What a model returns without labels, a tensor or several."""
    if project != 'mmdet':
        return model(image, mode='tensor')
    # What follows the head that reads the neck's maps reads values of proposals.
    head = model.rpn_head if hasattr(model, 'rpn_head') else model.bbox_head
    scores, _ = head(model.extract_feat(image))
    return scores


@pytest.mark.parametrize(
    'page, project, base',
    [(*key, base) for key, bases in CASES.items() for base in bases],
)
def test_a_shipped_config_takes_the_snippet(page, project, base):
    pytest.importorskip(project)
    if project == 'mmdet':
        pytest.importorskip('mmcv._ext')
    cfg = Config.fromstring(f"_base_ = ['{project}::{base}']\n{snippet(page, project)}", '.py')
    init_default_scope(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert type(model.backbone).__name__ == 'MDEQBackbone'
    # One evaluation, and nothing that reads values, which meta tensors do not have.
    implicit = model.eval().backbone.implicit
    implicit.solver = implicit.solver.replace(max_iter=1, tol=0)
    with torch.no_grad(), torch.device('meta'):
        outputs = forward(model, project, torch.empty(1, 3, 64, 128))
    first = outputs[0] if isinstance(outputs, (list, tuple)) else outputs
    assert first.shape[0] == 1
