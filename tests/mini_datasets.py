"""Miniature data sets in the folder layout and file naming of the real ones."""

from pathlib import Path

import cv2
import numpy as np


def write_cityscapes(
    root: Path, size: tuple[int, int] = (64, 128), num_train: int = 3, num_val: int = 2
) -> Path:
    """Write images of coloured stripes, named and placed like those of Cityscapes.

    Args:
        root: The folder that stands for ``data/cityscapes``.
        size: Rows and columns of an image; the real ones have 1024 and 2048.
        num_train: Training images, of one city.
        num_val: Validation images, of another.

    Returns:
        ``root``.
    """
    rng = np.random.default_rng(0)
    for split, city, count in (('train', 'aachen', num_train), ('val', 'lindau', num_val)):
        images = root / 'leftImg8bit' / split / city
        labels = root / 'gtFine' / split / city
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            stem = f'{city}_{index:06d}_000019'
            # Stripes of trainIds 0 to 18, the last one void.
            stripes = (np.arange(size[1]) * 20 // size[1] + index) % 20
            target = np.where(stripes == 19, 255, stripes).astype(np.uint8)
            target = np.repeat(target[None], size[0], axis=0)
            image = np.repeat(target[..., None] * 13, 3, axis=2).astype(np.uint8)
            image[..., index % 3] ^= rng.integers(0, 16, size, dtype=np.uint8)
            cv2.imwrite(str(images / f'{stem}_leftImg8bit.png'), image)
            cv2.imwrite(str(labels / f'{stem}_gtFine_labelTrainIds.png'), target)
    return root


def write_class_folders(
    root: Path, splits: dict[str, int], num_classes: int = 10, size: int = 16
) -> Path:
    """Write ``root/SPLIT/CLASS/*.png``, each class a grey level with noise on it.

    Args:
        root: The data set's folder.
        splits: Images of each class, by split.
        num_classes: Number of class folders, named by numbers.
        size: Side of an image.

    Returns:
        ``root``.
    """
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for target in range(num_classes):
            folder = root / split / str(target)
            folder.mkdir(parents=True)
            for index in range(count):
                grey = 10 + 200 * target // num_classes
                image = grey + rng.integers(0, 20, (size, size))
                cv2.imwrite(str(folder / f'{target}_{index}.png'), image.astype(np.uint8))
    return root
