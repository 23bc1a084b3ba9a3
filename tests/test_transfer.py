"""ImageNet -> Cityscapes: the segmentor starts from the classifier's backbone (paper, §4.3)."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import mdeq_mm  # noqa: F401
from tools import train

ROOT = Path(__file__).resolve().parents[1]


def build(cfg):
    scope = cfg.default_scope
    pytest.importorskip(scope)
    init_default_scope(scope)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg.model)


def documented_command(checkpoint):
    """Arguments of docs/weights_and_transfer.md's command, with the checkpoint of the test."""
    page = (ROOT / 'docs/weights_and_transfer.md').read_text()
    page = page[page.index('## From ImageNet to Cityscapes') :]
    block = re.search(r'```bash\n(.*?)```', page, flags=re.DOTALL)[1].replace('\\\n', ' ')
    (line,) = [line for line in block.splitlines() if 'cityscapes' in line]
    line, replaced = re.subn(r'(?<=init_cfg\.checkpoint=)\S+', str(checkpoint), line)
    assert replaced == 1
    return shlex.split(line)[2:]


def test_the_documented_command_moves_every_tensor_of_the_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    classifier = build(Config.fromfile('configs/mdeq_small_imagenet.py'))
    classifier.init_weights()
    # Away from every value that an initialization could give.
    for tensor in classifier.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
    checkpoint = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=classifier.state_dict(), meta={}), checkpoint)

    args = train.parse_args(documented_command(checkpoint))
    cfg = train.load_config(args.config)
    assert cfg.model.backbone.get('init_cfg') is None
    train.apply_flags(cfg, args)
    segmentor = build(cfg)
    assert cfg.model.type == 'EncoderDecoder'
    segmentor.init_weights()

    source = classifier.backbone.state_dict()
    target = segmentor.backbone.state_dict()
    assert source.keys() == target.keys()
    assert [name for name in source if not torch.equal(source[name], target[name])] == []
