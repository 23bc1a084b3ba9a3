import hashlib
import json
import stat

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tools.dataset_converters import digit_scenes as scenes

SMALL = dict(num_train=6, num_val=4, size=64)


def digest(folder):
    files = sorted(p for p in folder.rglob('*.png'))
    return [(str(p.relative_to(folder)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def read(folder, kind, split):
    paths = sorted((folder / kind / split).iterdir())
    return np.stack([cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in paths])


def test_layout_shapes_and_label_range(tmp_path):
    assert scenes.build(tmp_path / 'out', **SMALL)
    for split, count in (('train', 6), ('val', 4)):
        images = read(tmp_path / 'out', 'images', split)
        labels = read(tmp_path / 'out', 'annotations', split)
        assert images.shape == (count, 64, 64, 3) and images.dtype == np.uint8
        assert labels.shape == (count, 64, 64) and labels.dtype == np.uint8
        assert labels.max() == scenes.BACKGROUND == len(scenes.CLASSES) - 1
        assert (labels != scenes.BACKGROUND).any(axis=(1, 2)).all()


def test_every_class_occurs(tmp_path):
    scenes.build(tmp_path / 'out', num_train=40, num_val=40, size=64)
    for split in ('train', 'val'):
        found = np.unique(read(tmp_path / 'out', 'annotations', split))
        assert found.tolist() == list(range(11))


def test_same_seed_same_images_other_seed_others(tmp_path):
    for name, seed in (('a', 3), ('b', 3), ('c', 4)):
        scenes.build(tmp_path / name, seed=seed, **SMALL)
    a, b, c = (digest(tmp_path / name) for name in 'abc')
    assert a == b
    assert not {h for _, h in a} & {h for _, h in c}


def test_validation_scenes_do_not_depend_on_the_number_of_training_scenes(tmp_path):
    scenes.build(tmp_path / 'a', **SMALL)
    scenes.build(tmp_path / 'b', **{**SMALL, 'num_train': 9})
    for kind in ('images', 'annotations'):
        a, b = (read(tmp_path / name, kind, 'val') for name in 'ab')
        np.testing.assert_array_equal(a, b)


def test_splits_share_no_digit_and_no_piece_of_a_photograph():
    train_digits, train_targets, train_photos = scenes.sources('train')
    val_digits, val_targets, val_photos = scenes.sources('val')
    data = load_digits()
    np.testing.assert_array_equal(val_digits, data.images[::5])
    np.testing.assert_array_equal(val_targets, data.target[::5])
    assert len(train_digits) + len(val_digits) == len(data.images)
    assert len(train_targets) == len(train_digits)
    for train, val in zip(train_photos, val_photos, strict=True):
        assert not np.shares_memory(train, val)
        assert train.shape[1] + val.shape[1] == 640


def test_ink_is_brighter_than_the_brightest_photograph():
    """White paper is the hardest background; every digit still stands out from it."""
    digits, targets, photos = scenes.sources('train')
    white = [np.full_like(photo, 255) for photo in photos]
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(20):
        image, labels = scenes.make_scene(digits, targets, white, 64, rng)
        luminance = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(float)
        around = luminance[labels == scenes.BACKGROUND].mean()
        for digit in set(np.unique(labels)) - {scenes.BACKGROUND}:
            # Without the soft edge of the stroke.
            inner = cv2.erode((labels == digit).astype(np.uint8), np.ones((3, 3))) > 0
            if inner.sum() > 10:
                compared += 1
                assert luminance[inner].mean() > around + 25
    assert compared > 20


def test_second_build_keeps_the_files_and_other_arguments_replace_them(tmp_path):
    out = tmp_path / 'out'
    assert scenes.build(out, **SMALL)
    image = out / 'images' / 'train' / '00000.png'
    before = image.stat().st_mtime_ns
    assert not scenes.build(out, **SMALL)
    assert image.stat().st_mtime_ns == before
    assert scenes.build(out, **{**SMALL, 'num_train': 2})
    assert len(list((out / 'images' / 'train').iterdir())) == 2
    assert json.loads((out / 'manifest.json').read_text())['train'] == 2
    # Other users may read it, unlike the temporary folder it was written in.
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_an_interrupted_build_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    real, calls = scenes.make_scene, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(scenes, 'make_scene', interrupted)
    with pytest.raises(KeyboardInterrupt):
        scenes.build(tmp_path / 'out', **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(scenes, 'make_scene', real)
    assert scenes.build(tmp_path / 'out', **SMALL)


def test_foreign_files_are_never_removed(tmp_path):
    (tmp_path / 'letter.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='remove it or name another'):
        scenes.build(tmp_path, **SMALL)
    assert (tmp_path / 'letter.txt').read_text() == 'mine'


@pytest.mark.parametrize('wrong', [dict(num_train=0), dict(num_val=-1), dict(size=16)])
def test_numbers_too_small_are_named(tmp_path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f'{name}={value}'):
        scenes.build(tmp_path / 'out', **{**SMALL, **wrong})
