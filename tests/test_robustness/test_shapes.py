"""Any shape either works or is refused at construction, with the reason."""

import ast
import re

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from ..checks import assert_finite
from . import SOLVERS, tiny_backbone

few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def halved(size, times):
    for _ in range(times):
        size = (size + 1) // 2
    return size


@few
@given(
    batch=st.integers(1, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    num_scales=st.integers(1, 4),
    strides=st.sampled_from([(1,), (2,), (1, 1), (2, 2), (2, 1, 2)]),
    upsample=st.sampled_from(['nearest', 'bilinear']),
    kind=st.sampled_from(SOLVERS),
)
def test_any_image_at_any_number_of_scales(
    batch, height, width, num_scales, strides, upsample, kind
):
    net = tiny_backbone(
        kind,
        max_iter=3,
        channels=(4, 8, 4, 12)[:num_scales],
        norm_cfg=dict(type='GN', num_groups=2),
        stem_strides=strides,
        upsample=upsample,
        norm_eval=True,
    )
    x = torch.randn(batch, 3, height, width, requires_grad=True)
    outs = net(x)
    first = strides.count(2)
    for i, (out, channels) in enumerate(zip(outs, (4, 8, 4, 12))):
        assert out.shape == (batch, channels, halved(height, first + i), halved(width, first + i))
        assert_finite(out)
    sum(out.square().sum() for out in outs).backward()
    assert x.grad.shape == x.shape and torch.isfinite(x.grad).all()


@few
@given(
    channels=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    num_groups=st.integers(0, 8),
    expansion=st.integers(1, 3),
    batch=st.integers(1, 2),
    size=st.integers(1, 6),
)
def test_channels_and_groups_work_or_are_refused_at_construction(
    channels, num_groups, expansion, batch, size
):
    try:
        net = tiny_backbone(
            max_iter=2,
            channels=channels,
            expansion=expansion,
            norm_cfg=dict(type='GN', num_groups=num_groups),
            norm_eval=True,
        )
    except ValueError as error:
        message = str(error)
        refused = int(re.search(r'(\d+) channels do not split', message).group(1))
        assert refused in channels and f"'num_groups': {num_groups}" in message
        return
    assert num_groups and all(c % num_groups == 0 for c in channels)
    outs = net(torch.randn(batch, 3, size, size))
    assert [out.shape[1] for out in outs] == channels
    sum(out.sum() for out in outs).backward()


@few
@given(channels=st.integers(1, 24), num_groups=st.integers(1, 12))
def test_the_numbers_of_groups_that_a_refusal_offers_are_accepted(channels, num_groups):
    def build(groups):
        return tiny_backbone(channels=(channels,), norm_cfg=dict(type='GN', num_groups=groups))

    try:
        build(num_groups)
    except ValueError as error:
        offered = ast.literal_eval(re.search(r'num_groups from (\[.*?\])', str(error)).group(1))
        assert offered and num_groups not in offered
        for groups in offered:
            build(groups)
    else:
        assume(False)


@pytest.mark.parametrize('channels', [(4,), (4, 4), (4, 4, 4, 4)])
def test_one_pixel_and_one_channel_a_group(channels):
    """Each group of the last scale is a single number, whose normalized value is zero."""
    net = tiny_backbone(channels=channels, norm_eval=True)
    outs = net(torch.randn(1, 3, 1, 1))
    assert {out.shape[-2:] for out in outs} == {(1, 1)}
    assert_finite(outs)


def test_images_of_many_sizes_one_after_the_other():
    """Masks, shapes and caches follow the image, not the first one seen."""
    net = tiny_backbone(drop_rate=0.3, norm_eval=True)
    for n, height, width in ((2, 16, 16), (1, 7, 9), (3, 16, 16), (2, 5, 30)):
        outs = net(torch.randn(n, 3, height, width))
        assert outs[0].shape == (n, 8, (height + 1) // 2, (width + 1) // 2)
        sum(out.sum() for out in outs).backward()


@pytest.fixture
def segmentor():
    pytest.importorskip('mmseg')
    from mmengine.registry import init_default_scope

    init_default_scope('mmseg')
    solver = dict(type='Anderson', max_iter=4, tol=1e-4)
    torch.manual_seed(0)

    def build(**test_cfg):
        return MODELS.build(
            dict(
                type='mmseg.EncoderDecoder',
                data_preprocessor=dict(type='mmseg.SegDataPreProcessor', mean=None, std=None),
                backbone=dict(
                    type='MDEQBackbone',
                    channels=(8, 8),
                    expansion=1,
                    norm_cfg=dict(type='GN', num_groups=4),
                    solver=solver,
                    gradient=dict(type='ImplicitGradient', solver=solver),
                ),
                decode_head=dict(
                    type='mmseg.FCNHead',
                    in_channels=(8, 8),
                    in_index=(0, 1),
                    input_transform='resize_concat',
                    channels=8,
                    kernel_size=1,
                    num_convs=1,
                    concat_input=False,
                    num_classes=5,
                    align_corners=False,
                ),
                # Read by attribute, as a Config gives it.
                test_cfg=ConfigDict(test_cfg),
            )
        ).eval()

    return build


def metas(n, height, width):
    shape = dict(ori_shape=(height, width), img_shape=(height, width), pad_shape=(height, width))
    return [dict(shape, padding_size=[0, 0, 0, 0], img_path='x.png') for _ in range(n)]


@pytest.mark.parametrize('size', [(32, 48), (33, 47), (17, 61)])
def test_whole_and_slide_inference(segmentor, size):
    whole = segmentor(mode='whole')
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = whole.inference(x, metas(2, *size))
        assert expected.shape == (2, 5, *size)
        # One window over everything is the whole image.
        one = segmentor(mode='slide', crop_size=size, stride=size)
        one.load_state_dict(whole.state_dict())
        torch.testing.assert_close(one.inference(x, metas(2, *size)), expected)
        # The last windows are moved inside. Where no other window reaches, the first one decides.
        slide = segmentor(mode='slide', crop_size=(16, 20), stride=(11, 15))
        slide.load_state_dict(whole.state_dict())
        logits = slide.inference(x, metas(2, *size))
        corner = whole.inference(x[:, :, :16, :20], metas(2, 16, 20))
    assert logits.shape == expected.shape and torch.isfinite(logits).all()
    torch.testing.assert_close(logits[:, :, :1, :15], corner[:, :, :1, :15], atol=1e-4, rtol=1e-4)


def test_test_time_augmentation_averages_the_views(segmentor):
    """A view and its mirror image: the answer for the mirrored input is the mirrored answer."""
    from mmengine.structures import PixelData
    from mmseg.models import SegTTAModel
    from mmseg.structures import SegDataSample

    tta = SegTTAModel(module=segmentor(mode='whole')).eval()

    def predict(image):
        views, samples = [], []
        for flip in (False, True):
            views.append([image.flip(-1) if flip else image])
            meta = metas(1, *image.shape[-2:])[0]
            meta.update(flip=flip, flip_direction='horizontal' if flip else None)
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.zeros(1, *image.shape[-2:]))
            samples.append([sample])
        (out,) = tta.test_step(dict(inputs=views, data_samples=samples))
        return out.pred_sem_seg.data

    image = torch.randint(0, 255, (3, 21, 32), dtype=torch.uint8)
    seen = predict(image)
    assert seen.shape == (1, 21, 32) and seen.unique().numel() > 1
    agree = (predict(image.flip(-1)).flip(-1) == seen).float().mean()
    # Except for ties, which rounding decides.
    assert agree > 0.99
