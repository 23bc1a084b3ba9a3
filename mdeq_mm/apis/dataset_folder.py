"""Write a data set's folder so that it is either complete or absent."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

MANIFEST = 'manifest.json'


def is_built(out_dir: Path, manifest: dict) -> bool:
    """Whether ``out_dir`` holds a complete data set made with exactly these arguments.

    Args:
        out_dir: The data set's folder.
        manifest: The arguments it should have been made with; JSON values only.
    """
    try:
        found = json.loads((out_dir / MANIFEST).read_text(encoding='utf-8'))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return found == json.loads(json.dumps(manifest))


def write_dataset(out_dir: Path, manifest: dict, write: Callable[[Path], None]) -> bool:
    """Write a data set into a temporary folder, then move it into place in one step.

    Args:
        out_dir: Where the data set goes.
        manifest: The arguments it is made with, stored with it. A folder already made with them is
            left as it is.
        write: Writes the data set into the folder it is given.

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: If ``out_dir`` holds files this function did not write.
    """
    out_dir = Path(out_dir)
    if is_built(out_dir, manifest):
        return False
    if out_dir.exists() and not (out_dir / MANIFEST).is_file():
        if not out_dir.is_dir() or any(out_dir.iterdir()):
            raise FileExistsError(
                f'{out_dir} exists and was not written by this tool (it has no {MANIFEST}); '
                'remove it or name another folder'
            )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f'.{out_dir.name}.', dir=out_dir.parent))
    try:
        write(unfinished)
        text = json.dumps(manifest, indent=2, sort_keys=True)
        (unfinished / MANIFEST).write_text(text + '\n', encoding='utf-8')
        # mkdtemp makes a folder that only its owner can read; data sets are usually shared.
        unfinished.chmod(0o755)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        unfinished.rename(out_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True
