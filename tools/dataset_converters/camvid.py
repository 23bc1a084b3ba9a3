"""Turn a download of CamVid (11 classes) into mmsegmentation's layout.

Two layouts are accepted. The first is the folder of the SegNet tutorial: ``train`` and
``trainannot``, ``val`` and ``valannot``, ``test`` and ``testannot``, where label 11 is void. The
second has mmsegmentation's layout already, ``images/SPLIT`` and ``annotations/SPLIT``, where 255 is
void. Both become ``OUT/{images,annotations}/SPLIT/*.png`` with the labels 0 to 10 in the order of
``CLASSES`` and 255 for void.
"""

import argparse
from pathlib import Path

from mdeq_mm.apis import write_dataset

import cv2
import numpy as np

CLASSES = (
    'sky',
    'building',
    'pole',
    'road',
    'pavement',
    'tree',
    'sign',
    'fence',
    'car',
    'pedestrian',
    'bicyclist',
)
VOID = 255
SPLITS = ('train', 'val', 'test')


def find_splits(source: Path) -> tuple[dict[str, tuple[Path, Path]], int]:
    """Find the folders of images and labels of each split.

    Args:
        source: The download's folder.

    Returns:
        For each split present its two folders, and the label that means void in them.

    Raises:
        FileNotFoundError: If ``source`` has neither layout.
    """
    forms = (
        ({s: (source / s, source / f'{s}annot') for s in SPLITS}, len(CLASSES)),
        ({s: (source / 'images' / s, source / 'annotations' / s) for s in SPLITS}, VOID),
    )
    for folders, void in forms:
        present = {s: pair for s, pair in folders.items() if all(p.is_dir() for p in pair)}
        if 'train' in present:
            return present, void
    raise FileNotFoundError(
        f'{source}: no CamVid found. Want train/ beside trainannot/ (and val, test likewise), '
        'or images/train/ beside annotations/train/'
    )


def convert_labels(labels: np.ndarray | None, void: int, path: Path) -> np.ndarray:
    """Check a label map and write void as 255.

    Args:
        labels: The label map as read, or None if it could not be read.
        void: The label that means void in it; 255 always does.
        path: Its file, for error messages.

    Returns:
        The labels, (H, W) uint8: 0 to 10, and 255 for void.

    Raises:
        ValueError: If it is not a label map of CamVid's 11 classes.
    """
    if labels is None or labels.ndim != 2 or labels.dtype != np.uint8:
        found = 'nothing readable' if labels is None else f'{labels.dtype}, {labels.shape}'
        raise ValueError(
            f'{path}: want a label map of 8-bit class numbers in one channel, found {found}. '
            'Colour-coded labels are another version of CamVid, with 32 classes'
        )
    bad = sorted(set(np.unique(labels).tolist()) - {*range(len(CLASSES)), void, VOID})
    if bad:
        raise ValueError(
            f'{path}: labels {bad} are not among 0 to {len(CLASSES) - 1} or {void} for void'
        )
    return np.where(labels == void, VOID, labels).astype(np.uint8)


def _convert(
    image_path: Path, label_path: Path, out: tuple[Path, Path], void: int, size: tuple | None
) -> None:
    """Convert one image and its labels."""
    if not label_path.is_file():
        raise FileNotFoundError(f'{image_path} has no labels: {label_path} is missing')
    image = cv2.imread(str(image_path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f'{image_path}: not a readable image')
    labels = cv2.imread(str(label_path), cv2.IMREAD_UNCHANGED)
    labels = convert_labels(labels, void, label_path)
    if labels.shape != image.shape[:2]:
        raise ValueError(
            f'{label_path} is {labels.shape[1]}x{labels.shape[0]}, its image '
            f'{image.shape[1]}x{image.shape[0]}: want the same size'
        )
    if size is not None:
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
    cv2.imwrite(str(out[0]), image)
    cv2.imwrite(str(out[1]), labels)


def build(source: str | Path, out_dir: str | Path, size: tuple[int, int] | None = None) -> bool:
    """Convert CamVid unless it is there already.

    Args:
        source: The download's folder.
        out_dir: The data set's folder.
        size: Width and height to scale to (labels by nearest neighbour); None keeps the size.

    Returns:
        Whether anything was written.

    Raises:
        FileNotFoundError: If ``source`` is not CamVid or a label map is missing.
        FileExistsError: If ``out_dir`` holds other files.
        ValueError: If a file is not a valid image or label map.
    """
    splits, void = find_splits(Path(source))
    images = {s: sorted(pair[0].glob('*.png')) for s, pair in splits.items()}
    empty = [str(splits[s][0]) for s, found in images.items() if not found]
    if empty:
        raise FileNotFoundError(f'no *.png in {", ".join(empty)}')
    counts = {s: len(found) for s, found in images.items()}
    manifest = dict(dataset='camvid', version=1, size=size, source=str(source), **counts)

    def write(folder: Path) -> None:
        for split, paths in images.items():
            kinds = (folder / 'images' / split, folder / 'annotations' / split)
            for kind in kinds:
                kind.mkdir(parents=True)
            for path in paths:
                out = (kinds[0] / path.name, kinds[1] / path.name)
                _convert(path, splits[split][1] / path.name, out, void, size)

    return write_dataset(Path(out_dir), manifest, write)


def parse_size(text: str) -> tuple[int, int]:
    """Read ``WIDTHxHEIGHT``."""
    try:
        width, height = (int(part) for part in text.lower().split('x'))
    except ValueError:
        width = height = 0
    if min(width, height) < 1:
        raise argparse.ArgumentTypeError(f'{text!r}: want WIDTHxHEIGHT, for example 240x180')
    return width, height


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', help="the download's folder")
    parser.add_argument('out', help='folder to write, such as data/camvid')
    parser.add_argument(
        '--size',
        type=parse_size,
        help='scale to this size, such as 240x180 (default: keep the size)',
    )
    args = parser.parse_args()
    try:
        written = build(args.source, args.out, args.size)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        parser.exit(1, f'{parser.prog}: {error}\n')
    print(f'{args.out}: {"written" if written else "already there"}')


if __name__ == '__main__':
    main()
