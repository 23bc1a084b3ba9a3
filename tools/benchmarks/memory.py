"""Suite memory: peak memory of a training step, at growing max_iter and beside HRNet."""

import argparse
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from nets import SMALL, backbone, hrnet_w18, train_step
from timing import Result, Step

HRNET = 'HRNet-W18 (mmseg)'
COUNTS = (6, 12, 20, 40)
MALLOC = 'MALLOC_MMAP_THRESHOLD_'


class PeakMemory:
    """Peak memory of a block over what was in use before it, in bytes.

    On a CPU a thread watches the resident memory of the process.
    """

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0

    def _resident(self) -> int:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        return os.sysconf('SC_PAGE_SIZE') * pages

    def __enter__(self) -> 'PeakMemory':
        if self.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start, self.running = self._resident(), True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, self._resident() - self.start)
            time.sleep(0.002)

    def __exit__(self, *exc: Any) -> None:
        if self.device == 'cuda':
            self.peak = torch.cuda.max_memory_allocated() - self.start
        else:
            self.running = False
            self.thread.join()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one training step of each network."""
    samples = {}
    for count in (*COUNTS, None):
        name = HRNET if count is None else f'MDEQ-small, max_iter {count}'
        samples[name] = [peak_memory(args.device, _step, args.crop, args.device, count) / 2**20]
        print(f'  {name}: {samples[name][0]:.0f} MB', flush=True)
    h, w = args.crop
    caption = f'peak memory of a step over start, one {h}x{w} crop'
    result = Result.of(samples, f'MDEQ-small, max_iter {COUNTS[1]}', caption, unit='MB')
    print(f'\n{result}')
    return result.to_dict()


def _step(crop: tuple[int, int], device: str, count: int | None) -> Step:
    net = hrnet_w18(device) if count is None else backbone(device, count, **SMALL)
    return train_step(net, torch.randn(1, 3, *crop, device=device))


def peak_memory(device: str, build: Callable[..., Step], *args: Any) -> int:
    """Peak memory of a step over what was in use before it, in bytes.

    The step, that of ``build(*args)``, is the first of a process of its own, whose allocator holds
    nothing back.

    Args:
        device: Where it computes.
        build: A function that a new process can import.
        *args: What it takes.
    """
    # glibc keeps freed blocks below a moving threshold; from a mapping of their own they go back
    # at once, so that what is resident is what is in use. The child reads it when it starts.
    before = os.environ.get(MALLOC)
    os.environ[MALLOC] = '65536'
    try:
        context = torch.multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_peak, device, build, args).result()
    finally:
        del os.environ[MALLOC]
        os.environ.update({} if before is None else {MALLOC: before})


def _peak(device: str, build: Callable[..., Step], args: tuple) -> int:
    step = build(*args)
    with PeakMemory(device) as memory:
        step()
    return memory.peak
