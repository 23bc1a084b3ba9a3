"""Frames of a video in and out, and the prediction for each of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate, pseudo_collate

from ..registry import type_name
from .data import test_dataset

VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')
IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
CODECS = {'.avi': 'MJPG', '.mp4': 'mp4v'}


def is_stream(path: str) -> bool:
    """Whether a path is a folder or is named as a video is."""
    return Path(path).is_dir() or Path(path).suffix.lower() in VIDEOS


class Frames:
    """The frames of a video, or of a folder of images in the order of their names.

    Iterating gives arrays (H, W, 3), BGR uint8.

    Args:
        path: The video or the folder.

    Attributes:
        count: Number of frames; of a video what its header says, 0 where it says nothing.
        rate: Frames a second; 25 where the source has none.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no image in the folder.
        ValueError: If the first frame cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path, self.rate = path, 25.0
        self._files: list[Path] = []
        if Path(path).is_dir():
            names = Path(path).iterdir()
            self._files = sorted(p for p in names if p.suffix.lower() in IMAGE_SUFFIXES)
            if not self._files:
                raise FileNotFoundError(
                    f'folder {path} has no images ({", ".join(IMAGE_SUFFIXES)})'
                )
            self.count = len(self._files)
        elif Path(path).is_file():
            video = cv2.VideoCapture(path)
            self.rate = video.get(cv2.CAP_PROP_FPS) or self.rate
            self.count = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
            video.release()
        else:
            raise FileNotFoundError(f'video {path} does not exist')
        next(iter(self))

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._images() if self._files else self._video()

    def _images(self) -> Iterator[np.ndarray]:
        for file in self._files:
            image = cv2.imread(str(file))
            if image is None:
                raise ValueError(f'{file} is not an image that can be read')
            yield image

    def _video(self) -> Iterator[np.ndarray]:
        video = cv2.VideoCapture(self.path)
        try:
            found, frame = video.read()
            if not found:
                raise ValueError(
                    f'{self.path} is not a video that OpenCV can read. Convert it, for example '
                    'to H.264 in an .mp4, or give a folder of its frames'
                )
            while found:
                yield frame
                found, frame = video.read()
        finally:
            video.release()


class VideoFile:
    """Writes a video that is whole whenever it is closed, also by an interrupt.

    A frame of another size begins another file, NAME_2 and so on: a video has one size.

    Args:
        path: The file, .mp4 or .avi.
        rate: Frames a second.

    Attributes:
        paths: The files that were begun.

    Raises:
        ValueError: If the name ends otherwise.
    """

    def __init__(self, path: str, rate: float) -> None:
        self.path, self.rate, self.paths = Path(path), rate, []
        if self.path.suffix.lower() not in CODECS:
            raise ValueError(f'--out {path}: a video is written as {" or ".join(CODECS)}')
        self._writer: cv2.VideoWriter | None = None
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> 'VideoFile':
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._writer is not None:
            self._writer.release()

    def write(self, frame: np.ndarray) -> None:
        """Add a frame (H, W, 3), BGR uint8.

        Raises:
            OSError: If the file cannot be written.
        """
        if frame.shape[:2] != self._size:
            self._begin(frame.shape[:2])
        self._writer.write(frame)

    def _begin(self, size: tuple[int, int]) -> None:
        if self._writer is not None:
            self._writer.release()
        number = len(self.paths) + 1
        path = self.path if number == 1 else self.path.with_stem(f'{self.path.stem}_{number}')
        path.parent.mkdir(parents=True, exist_ok=True)
        codec = cv2.VideoWriter_fourcc(*CODECS[path.suffix.lower()])
        self._writer = cv2.VideoWriter(str(path), codec, self.rate, size[::-1])
        if not self._writer.isOpened():
            raise OSError(f'cannot write {path} with frames of {size[1]}x{size[0]}')
        self._size = size
        self.paths.append(path)


def image_batch(cfg: Config, image: np.ndarray, path: str | None = None) -> dict[str, Any]:
    """Make the batch of one image that the config's test pipeline would make of its file.

    Args:
        cfg: The config.
        image: (H, W, 3), RGB uint8.
        path: Its file, which a pipeline that loads files reads again; None for a frame of a video.

    Raises:
        ValueError: If the config has no data set to test or to validate with.
    """
    dataset = test_dataset(cfg)
    if dataset is None:
        raise ValueError(
            'the config has no test_dataloader or val_dataloader, whose pipeline says how an image '
            'is prepared; add one'
        )
    steps = [step for step in dataset['pipeline'] if not _reads_labels(type_name(step))]
    loader = next((step for step in steps if type_name(step) == 'LoadImageFromFile'), None)
    if path is None and loader is not None:
        steps.remove(loader)
        # That step gives BGR. Data sets that hold arrays, as CIFAR-10 does, load no file, and the
        # arrays are RGB.
        image = image[..., ::-1]
        if loader.get('color_type') == 'grayscale':
            image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGR2GRAY)
    size = image.shape[:2]
    img = np.ascontiguousarray(image)
    sample = dict(img_path=path or '', img=img, img_shape=size, ori_shape=size)
    collate = default_collate if cfg.get('default_scope') == 'mmpretrain' else pseudo_collate
    return collate([Compose(steps)(sample)])


def _reads_labels(step: str) -> bool:
    """Whether a step of a pipeline, by its name, reads labels: an image of one's own has none."""
    return step == 'PresentClasses' or (step.startswith('Load') and 'Annotation' in step)
