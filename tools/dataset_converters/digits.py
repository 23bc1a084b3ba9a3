"""Write scikit-learn's handwritten digits as mmpretrain's ``CustomDataset`` reads them.

Each 8x8 digit is enlarged to 16x16 (bilinear, pixel centres at halves) and its values 0 to 16
become grey levels 0 to 255. Digits whose index is divisible by 5 are the test set. The folder is
``OUT/{train,test}/{0..9}/*.png``.
"""

import argparse
from pathlib import Path

from mdeq_mm.apis import write_dataset

import cv2
import numpy as np
from sklearn.datasets import load_digits

SIZE = 16


def to_image(digit: np.ndarray) -> np.ndarray:
    """Turn an (8, 8) digit of values 0 to 16 into a (16, 16) grey image, uint8."""
    grey = digit.astype(np.float32) * (255 / 16)
    return np.rint(cv2.resize(grey, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)).astype(np.uint8)


def build(out_dir: str | Path) -> bool:
    """Write the digits unless they are there already.

    Args:
        out_dir: The data set's folder.

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: If ``out_dir`` holds other files.
    """

    def write(folder: Path) -> None:
        data = load_digits()
        for split in ('train', 'test'):
            for target in range(10):
                (folder / split / str(target)).mkdir(parents=True)
        for index, (digit, target) in enumerate(zip(data.images, data.target, strict=True)):
            split = 'test' if index % 5 == 0 else 'train'
            path = folder / split / str(target) / f'{index:04d}.png'
            cv2.imwrite(str(path), to_image(digit))

    return write_dataset(Path(out_dir), dict(dataset='digits', version=1, size=SIZE), write)


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='folder to write, such as data/digits')
    args = parser.parse_args()
    try:
        written = build(args.out)
    except FileExistsError as error:
        parser.exit(1, f'{parser.prog}: {error}\n')
    print(f'{args.out}: {"written" if written else "already there"}')


if __name__ == '__main__':
    main()
