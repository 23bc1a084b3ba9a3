"""Processes for training, forked from a server that has imported what it needs.

A process of its own costs seconds of imports otherwise. What each prints goes into a file, which is
shown where the process does not end as it should.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context('forkserver')
# What MM imports only when it is asked for.
_PARTS = ('datasets', 'engine', 'evaluation', 'models', 'visualization')
_PRELOADED = [f'{package}.{part}' for package in ('mmseg', 'mmpretrain') for part in _PARTS]
CONTEXT.set_forkserver_preload([*_PRELOADED, 'matplotlib.pyplot', 'torch._dynamo', 'mdeq_mm'])
# Far above what any takes: a process that waits for ever fails its test.
LIMIT = 300


def start(
    function: Callable[..., Any],
    *args: Any,
    folder: Path,
    log: str = 'log.txt',
    env: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Call a function of a module in a process of its own, in ``folder``, without GPUs."""
    given = (function, args, str(folder), log, dict(env or {}))
    process = CONTEXT.Process(target=_call, args=given)
    process.log = Path(folder, log)
    # A process may be killed before it has opened the file.
    process.log.touch()
    process.start()
    return process


def finish(processes: Sequence[BaseProcess], expect: int = 0) -> None:
    """Wait for the end of processes; when one fails, the others are killed.

    Raises:
        AssertionError: If one has another exit status than ``expect``, with what each printed.
    """
    running, failed = list(processes), None
    while running and failed is None:
        ended = wait([process.sentinel for process in running], LIMIT)
        failed = None if ended else f'not done after {LIMIT} s'
        for process in [p for p in running if p.sentinel in ended]:
            process.join()
            running.remove(process)
            if process.exitcode != expect and failed is None:
                # Their logs have the same name but for a number.
                failed = f'{process.log.name}: exit status {process.exitcode}, wanted {expect}'
    for process in running:
        process.kill()
        process.join()
    shown = '\n'.join(f'--- {p.log.name} ---\n{p.log.read_text()}' for p in processes)
    print(shown)
    if failed is not None:
        raise AssertionError(f'{failed}\n{shown}')


def run(function: Callable[..., Any], *args: Any, expect: int = 0, **options: Any) -> str:
    """Call a function in a process of its own; what it printed."""
    process = start(function, *args, **options)
    finish([process], expect)
    return process.log.read_text()


def _call(function: Callable[..., Any], args: tuple, folder: str, log: str, env: dict) -> None:
    # What the server imported is nothing to collect.
    gc.freeze()
    os.chdir(folder)
    os.environ.update(env, CUDA_VISIBLE_DEVICES='')
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from tests import plain_dump  # noqa: F401

    function(*args)
