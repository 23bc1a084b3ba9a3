"""Checkpoint files: checked before anything is built, and found to resume from."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.runner import find_latest_checkpoint

from ..compat import UnsafeCheckpointError, verify_checkpoint
from ..model_index import packaged_weights
from ..registry import type_name


def check_checkpoint(path: str | None) -> None:
    """Check a checkpoint file before anything is built; a URL is left to the Runner.

    Args:
        path: A file, a URL such as ``https://...``, or None for no checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
        UnsafeCheckpointError: If loading it could run code.
    """
    if path is None or '://' in path:
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    verify_checkpoint(path)


def given_or_packaged(checkpoint: str | None, config: str) -> str:
    """The checkpoint that was given, or the weights that come with the package for a config.

    Prints which weights it takes of the package.

    Args:
        checkpoint: A file or URL, or None for the package's weights.
        config: Path of the config; its name says which weights.

    Raises:
        ValueError: If none is given and the package has none for this config.
    """
    if checkpoint is not None:
        return checkpoint
    weights = packaged_weights()
    name = Path(config).stem
    if name not in weights:
        raise ValueError(
            f'no checkpoint was given, and no weights come with the package for {name}, only for '
            f'{", ".join(weights)}'
        )
    path = str(weights[name])
    measured = verify_checkpoint(path)['meta']['metrics']
    metrics = ', '.join(f'{metric} {value:.1f}' for metric, value in measured.items())
    print(f'weights: {path} ({metrics} on the test images)')
    return path


def pretrained_files(node: Any) -> Iterator[str]:
    """Yield the files named by ``init_cfg=dict(type='Pretrained', ...)`` anywhere in a model."""
    if isinstance(node, dict):
        pretrained = type_name(node) in ('Pretrained', 'PretrainedInit')
        if pretrained and isinstance(node.get('checkpoint'), str):
            yield node['checkpoint']
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from pretrained_files(value)


def find_resumable_checkpoint(work_dir: str) -> str | None:
    """Find the checkpoint to resume from: the latest, or if it is damaged the one before it.

    Args:
        work_dir: Folder of the interrupted run. Its file ``last_checkpoint`` names the latest.

    Returns:
        Path of an undamaged checkpoint; None if the folder neither has nor names one.

    Raises:
        UnsafeCheckpointError: If loading the latest could run code.
        ValueError: If the latest is damaged and there is no other. The message names the file and
            the remedy.
    """
    latest = find_latest_checkpoint(work_dir) or None
    damage = 'The run stopped before it named its latest checkpoint in last_checkpoint.'
    if latest is not None:
        try:
            check_checkpoint(latest)
            return latest
        except FileNotFoundError as error:
            damage = f'{error}.'
        except ValueError as error:
            damage = str(error)
    for path in _checkpoints_in({work_dir, os.path.dirname(latest or '') or work_dir}):
        iteration = None if path == latest else _resumable_iteration(path)
        if iteration is not None:
            if os.environ.get('RANK', '0') == '0':
                text = f'--resume: {damage} Going on from {path}; all after iteration {iteration} '
                print(f'WARNING: {text}is trained again.', file=sys.stderr)
            return path
    if latest is None:
        return None
    raise ValueError(
        f'--resume: {damage} No other whole checkpoint is in {work_dir}. Name one by --resume '
        'CHECKPOINT, or train from the beginning without --resume.'
    )


def _resumable_iteration(path: str) -> int | None:
    """The iteration that training can resume from with this file; None if it cannot."""
    try:
        content = verify_checkpoint(path)
    except (ValueError, UnsafeCheckpointError):
        return None
    # A file of save_best holds weights only.
    resumable = {'state_dict', 'optimizer', 'message_hub', 'meta'} <= content.keys()
    return content['meta'].get('iter') if resumable else None


def _checkpoints_in(folders: set[str]) -> list[str]:
    """Checkpoint files, sorted by the epoch or iteration in their name, highest first."""

    def number(path: Path) -> int:
        found = re.findall(r'\d+', path.stem)
        return int(found[-1]) if found else -1

    paths = [path for folder in sorted(folders) for path in Path(folder).glob('*.pth')]
    return [str(path) for path in sorted(paths, key=number, reverse=True)]
