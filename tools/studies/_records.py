"""Settings and results of runs on disk, one file each. Does not import torch."""

import json
import os
from pathlib import Path
from typing import Any

from _studies import Row, Study

# File of the CPU seconds of an iteration of each row.
TIMES = 'times.json'
# The remedy if a result has other settings.
REMEDY = 'delete it, or name another folder by --out'


def write_json(path: Path, content: Any) -> None:
    """Write a file that is complete whenever it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    part.write_text(json.dumps(content, indent=1) + '\n')
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote; None if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None


def settings_of(study: Study, row: Row, seed: int, epochs: int) -> dict[str, Any]:
    """The settings that identify a run, as JSON values."""
    content = dict(
        config=row.config,
        options={**study.options, **row.options},
        warmup_share=row.warmup_share,
        holdout=study.holdout,
        seed=seed,
        epochs=epochs,
    )
    return json.loads(json.dumps(content))


def is_there(path: Path, settings: dict[str, Any], remedy: str) -> bool:
    """Whether there is such a file of a run with these settings.

    Raises:
        ValueError: If it is of a run with other settings; names them.
    """
    found = read_json(path)
    if found is None:
        return False
    other = [key for key, value in settings.items() if found.get(key) != value]
    if other:
        told = '; '.join(f'{key} {found.get(key)!r}, not {settings[key]!r}' for key in other)
        raise ValueError(f'{path} is of a run with {told}: {remedy}')
    return True
