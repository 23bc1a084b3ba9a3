"""Checkpoint files that survive an interruption at any moment."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

_BACKEND = 'mdeq_whole_files'


@register_backend(_BACKEND)
class WholeFileBackend(LocalBackend):
    """The local file system, where a file gets its name only once it is complete and on disk."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write to ``filepath`` + ``.part``, then rename, so the old file survives a kill."""
        part = f'{filepath}.part'
        super().put(obj, part)
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, filepath)


@HOOKS.register_module()
class MDEQCheckpointHook(CheckpointHook):
    """MM's ``CheckpointHook``, safe against interruption at any moment; same options.

    MM removes the files to be replaced first and then writes into the final file. A process killed
    in between leaves a truncated checkpoint, with ``max_keep_ckpts=1`` or ``save_best`` the only
    one. Here local files are written under another name and renamed, and old ones are removed
    afterwards. Meanwhile the disk holds one checkpoint more.
    """

    def before_train(self, runner: Runner) -> None:
        if self.file_client_args is None and self.backend_args is None:
            backend = get_file_backend(self.out_dir or runner.work_dir)
            if type(backend) is LocalBackend:
                self.backend_args = dict(backend=_BACKEND)
        super().before_train(runner)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        with self._removing_last():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        with self._removing_last():
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _removing_last(self) -> Iterator[None]:
        """Postpone the hook's removals until it has written; skip them if that fails."""
        backend, removals = self.file_backend, []
        late = copy.copy(backend)
        late.remove = lambda path: removals.append((backend.remove, path))
        late.rmtree = lambda path: removals.append((backend.rmtree, path))
        self.file_backend = late
        try:
            yield
        finally:
            self.file_backend = backend
        new = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}
        new.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        for remove, path in removals:
            # After a resume, a new checkpoint may have the name of an old one.
            if path not in new:
                remove(path)
