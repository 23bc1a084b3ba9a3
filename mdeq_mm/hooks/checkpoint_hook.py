"""Checkpoints of which a whole one is there at any moment."""

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
    """The local file system; a file has its name only once it is whole and on the disk."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write to ``filepath`` + ``.part``, then rename: a break leaves the old file whole."""
        part = f'{filepath}.part'
        super().put(obj, part)
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, filepath)


@HOOKS.register_module()
class MDEQCheckpointHook(CheckpointHook):
    """MM's ``CheckpointHook``, safe against a break at any moment; the same options.

    MM writes into the final file and first removes the ones it replaces: a process killed in
    between leaves a truncated checkpoint, with ``max_keep_ckpts=1`` or for ``save_best`` the only
    one. Here local files are written under another name and renamed, and old ones are removed
    when the new one is there. For that moment the disk holds one checkpoint more.
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
        """Keep what the hook removes until it has written; for good if that fails."""
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
            # After a resume a checkpoint may have been written over one of the same step.
            if path not in new:
                remove(path)
