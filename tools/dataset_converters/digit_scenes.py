"""Make digit scenes: real handwritten digits at many sizes over real photographs.

The digits are scikit-learn's ``load_digits`` (1797 digits, 8x8), the photographs its
``china.jpg`` and ``flower.jpg``. Nothing is downloaded. Training and validation share neither a
digit nor a part of a photograph: every fifth digit and the right quarter of each photograph are for
validation only.

The labels are 0 to 9 for the digits and 10 for the background. The folder has mmsegmentation's
layout: ``OUT/images/{train,val}/*.png`` and ``OUT/annotations/{train,val}/*.png``.
"""

import argparse
from pathlib import Path

from mdeq_mm.apis import write_dataset

import cv2
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

CLASSES = ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'background')
BACKGROUND = 10
# Raised whenever the same arguments make other images.
VERSION = 1

# A pixel belongs to a digit where its ink, 0 to 1, exceeds this.
_INK_THRESHOLD = 0.35
# The photographs are dimmed by this factor, and the ink has any colour at least this bright in
# every channel, 0 to 255, so that it stands out everywhere.
_DIM = 0.5
_BRIGHT = 170
# Heights of the digits in pixels; at most 0.8 of the scene.
_SMALLEST = 20
_LARGEST = 48


def _stroke(digit: np.ndarray, height: int, angle: float) -> np.ndarray:
    """Enlarge an 8x8 digit smoothly, turn it, and crop it to its ink.

    Args:
        digit: The digit, (8, 8), values 0 to 16.
        height: Its height in the scene, in pixels.
        angle: Degrees to turn it by.

    Returns:
        The ink, (H, W) float32 in 0 to 1, at most about ``height`` high.
    """
    # A border of one empty pixel, so that strokes fade out and are not cut off.
    padded = np.pad(digit.astype(np.float32) / 16, 1)
    side = round(height * 10 / 8)
    ink = cv2.resize(padded, (side, side), interpolation=cv2.INTER_CUBIC)
    turn = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), angle, 1)
    ink = np.clip(cv2.warpAffine(ink, turn, (side, side), flags=cv2.INTER_LINEAR), 0, 1)
    rows = np.flatnonzero((ink > 0.1).any(axis=1))
    columns = np.flatnonzero((ink > 0.1).any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _background(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a square of random side from a photograph, scale it to ``size`` and dim it."""
    side = int(rng.integers(min(size, *photo.shape[:2]) // 2 + 1, min(photo.shape[:2]) + 1))
    top = rng.integers(photo.shape[0] - side + 1)
    left = rng.integers(photo.shape[1] - side + 1)
    crop = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
    return _DIM * crop.astype(np.float32)


def _place(taken: np.ndarray, shape: tuple, rng: np.random.Generator) -> tuple | None:
    """Find a place for a box of ``shape`` that touches no other, or None after 20 tries."""
    room = (taken.shape[0] - shape[0], taken.shape[1] - shape[1])
    if min(room) < 0:
        return None
    for _ in range(20):
        top, left = int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1))
        box = (slice(top, top + shape[0]), slice(left, left + shape[1]))
        if not taken[box].any():
            return box
    return None


def make_scene(
    digits: np.ndarray,
    targets: np.ndarray,
    photos: list,
    size: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Compose one scene of up to five digits, none over another.

    Args:
        digits: The digits to choose from, (M, 8, 8), values 0 to 16.
        targets: Which digit each one is, (M,).
        photos: The photographs to choose from, each (H, W, 3) BGR uint8.
        size: Side of the scene in pixels.
        rng: The random generator.

    Returns:
        The image, (size, size, 3) BGR uint8, and its labels, (size, size) uint8.
    """
    image = _background(photos[rng.integers(len(photos))], size, rng)
    labels = np.full((size, size), BACKGROUND, dtype=np.uint8)
    taken = np.zeros((size, size), dtype=bool)
    for _ in range(int(rng.integers(2, 6))):
        index = int(rng.integers(len(digits)))
        largest = min(_LARGEST, round(0.8 * size))
        height = int(rng.integers(min(_SMALLEST, largest), largest + 1))
        ink = _stroke(digits[index], height, float(rng.uniform(-10, 10)))
        box = _place(taken, ink.shape, rng)
        if box is None:
            continue
        taken[box] = True
        # A steeper ink keeps the middle of a stroke opaque and its edge soft.
        cover = np.clip((ink - 0.15) / 0.35, 0, 1)[..., None]
        colour = rng.integers(_BRIGHT, 256, 3).astype(np.float32)
        image[box] = image[box] * (1 - cover) + colour * cover
        labels[box][ink > _INK_THRESHOLD] = targets[index]
    noise = rng.normal(0, 4, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), labels


def sources(split: str) -> tuple[np.ndarray, np.ndarray, list]:
    """The digits and the parts of the photographs of one split.

    Args:
        split: ``'train'`` or ``'val'``.

    Returns:
        Digits (M, 8, 8), which digit each is (M,), and the photographs, BGR uint8.
    """
    data = load_digits()
    held_out = np.arange(len(data.target)) % 5 == 0
    chosen = held_out if split == 'val' else ~held_out
    photos = []
    for name in ('china.jpg', 'flower.jpg'):
        photo = load_sample_image(name)[:, :, ::-1]
        border = photo.shape[1] * 3 // 4
        photos.append(photo[:, border:] if split == 'val' else photo[:, :border])
    return data.images[chosen], data.target[chosen], photos


def build(
    out_dir: str | Path,
    num_train: int = 1000,
    num_val: int = 100,
    size: int = 64,
    seed: int = 0,
) -> bool:
    """Write the scenes in mmsegmentation's layout, unless they are there already.

    Args:
        out_dir: The data set's folder.
        num_train: Number of training scenes.
        num_val: Number of validation scenes.
        size: Side of a scene in pixels, at least 32.
        seed: The same seed and arguments give the same images.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: If a number is too small.
        FileExistsError: If ``out_dir`` holds other files.
    """
    if min(num_train, num_val) < 1 or size < 32:
        raise ValueError(
            f'num_train={num_train}, num_val={num_val}, size={size}: want at least one scene of '
            'each split and a size of at least 32'
        )
    counts = dict(train=num_train, val=num_val)
    manifest = dict(dataset='digit_scenes', version=VERSION, size=size, seed=seed, **counts)

    def write(folder: Path) -> None:
        for number, (split, count) in enumerate(counts.items()):
            for kind in ('images', 'annotations'):
                (folder / kind / split).mkdir(parents=True)
            digits, targets, photos = sources(split)
            # Each split has its own random stream: more training scenes do not change the others.
            rng = np.random.default_rng([seed, number])
            for index in range(count):
                image, labels = make_scene(digits, targets, photos, size, rng)
                name = f'{index:05d}.png'
                cv2.imwrite(str(folder / 'images' / split / name), image)
                cv2.imwrite(str(folder / 'annotations' / split / name), labels)

    return write_dataset(Path(out_dir), manifest, write)


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='folder to write, such as data/digit_scenes')
    parser.add_argument(
        '--num-train', type=int, default=1000, help='training scenes (default: %(default)s)'
    )
    parser.add_argument(
        '--num-val', type=int, default=100, help='validation scenes (default: %(default)s)'
    )
    parser.add_argument(
        '--size', type=int, default=64, help='side of a scene in pixels (default: %(default)s)'
    )
    parser.add_argument('--seed', type=int, default=0, help='random seed (default: %(default)s)')
    args = parser.parse_args()
    try:
        written = build(args.out, args.num_train, args.num_val, args.size, args.seed)
    except (ValueError, FileExistsError) as error:
        parser.exit(1, f'{parser.prog}: {error}\n')
    state = 'written' if written else 'already there'
    print(f'{args.out}: {args.num_train} training and {args.num_val} validation scenes {state}')


if __name__ == '__main__':
    main()
