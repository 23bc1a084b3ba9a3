"""Timing for all suites: candidates run in turn, and ratios are those of the fastest runs.

Changes of the machine's speed affect every candidate of a round alike, and other work on the
machine lengthens some runs but shortens none. The minimum is therefore the time that the work
takes, and the median shows how disturbed the machine was.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """What a suite measured; smaller is better.

    Attributes:
        caption: What was measured.
        unit: Of ``minimum`` and ``median``.
        base: The candidate whose ratio is 1.
        minimum, median: Over the rounds, by candidate.
        ratio: ``minimum`` over that of ``base``.
    """

    caption: str
    unit: str
    base: str
    minimum: dict[str, float]
    median: dict[str, float]
    ratio: dict[str, float]

    @classmethod
    def of(
        cls, samples: dict[str, list[float]], base: str, caption: str, unit: str = 's'
    ) -> 'Result':
        """Summarize the samples of each candidate.

        Raises:
            KeyError: If ``base`` is not a candidate.
        """
        least = {name: min(values) for name, values in samples.items()}
        middle = {name: median(values) for name, values in samples.items()}
        ratio = {name: value / least[base] for name, value in least.items()}
        return cls(caption, unit, base, least, middle, ratio)

    def __str__(self) -> str:
        width = max(map(len, self.minimum))
        lines = [
            f'{self.caption} [{self.unit}]',
            f'  {"":{width}} {"minimum":>10} {"median":>10} {"ratio":>8}',
        ]
        lines += [
            f'  {name:{width}} {least:10.4g} {self.median[name]:10.4g} {self.ratio[name]:8.3f}'
            for name, least in self.minimum.items()
        ]
        return '\n'.join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def timed(step: Step, device: str) -> float:
    """Seconds of one call; on a GPU by CUDA events."""
    if torch.device(device).type != 'cuda':
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    steps: dict[str, Step], rounds: int, device: str, quiet: bool = False
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; a round runs every one of them once.

    Args:
        steps: The candidates. Each is run once before the first round, which is not counted.
        rounds: How often each is timed.
        device: Where they compute.
        quiet: Print no progress.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    say = (lambda text: None) if quiet else (lambda text: print(f'  {text}', flush=True))
    for name, step in steps.items():
        say(f'warming up: {name}')
        step()
    for number in range(1, rounds + 1):
        say(f'round {number} of {rounds}')
        for name, step in steps.items():
            samples[name].append(timed(step, device))
    return samples


def matmul_rate(device: str, dtype: torch.dtype, largest: int = 2048) -> float:
    """Measured floating-point operations a second of a large matrix product.

    The size is chosen to take a CPU some hundredths of a second: without instructions for ``dtype``
    the largest size would take minutes.
    """
    size, seconds = 256, 0.0
    while size < largest and seconds < 0.02:
        size *= 2
        a = torch.randn(size, size, device=device).to(dtype)
        seconds = timed(lambda a=a: a @ a, device)
    samples = interleaved({'matmul': lambda: a @ a}, 9, device, quiet=True)
    return 2 * size**3 / min(samples['matmul'])


def count_operations(step: Step) -> int:
    """Floating-point operations of the matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
