"""Runs cases, counts, and reports."""

import argparse
import contextlib
import gc
import itertools
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope, init_default_scope
from torch import Tensor

from mdeq_mm.layers import reset_masks

from .actions import ACTIONS
from .case import Case, require
from .faults import FAULTS, inject

INF = float('inf')
#: No more live tensors after an action than before it. Resident memory may grow by so much from the
#: end of the first cases on: oneDNN keeps what it made for each new shape, up to a number of them.
MAX_GROWTH_MB, SETTLED_AFTER = 256, 30


def live_tensors(case: Case) -> int:
    """Live tensors that the case may not keep."""
    owned = {id(tensor) for tensor in case.owned()}
    gc.collect()
    # By type: some objects answer isinstance by importing what they stand for.
    return sum(issubclass(type(o), Tensor) and id(o) not in owned for o in gc.get_objects())


def resident_mb() -> float:
    """Resident memory of this process; its peak where the system does not tell the present."""
    with contextlib.suppress(OSError):
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        return pages * os.sysconf('SC_PAGE_SIZE') / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == 'darwin' else peak / 2**10


class Report:
    """What a run did.

    Attributes:
        cases: Cases begun.
        actions, faults, survived: How many of each kind.
        failures: (case, what, how it was drawn, traceback) of what did not hold.
        growth_mb: Resident memory at the end over that after the first cases.
        alive: Tensors beyond its own that the first case found alive.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.cases = 0
        self.actions, self.faults, self.survived = Counter(), Counter(), Counter()
        self.failures: list[tuple[int, str, str, str]] = []
        self.growth_mb = 0.0
        self.alive: int | None = None
        self._settled: float | None = None

    def watch_memory(self) -> None:
        """Note resident memory; growth beyond the bound is a failure, once."""
        now = resident_mb()
        if self._settled is None and self.cases >= SETTLED_AFTER:
            self._settled = now
        if self._settled is not None:
            was, self.growth_mb = self.growth_mb, now - self._settled
            if self.growth_mb > MAX_GROWTH_MB >= was:
                text = f'{self.growth_mb:.0f} MB more than after {SETTLED_AFTER} cases'
                self.failures.append((self.cases - 1, 'memory', 'the whole run', text))

    def __str__(self) -> str:
        lines = [f'seed {self.seed}: {self.cases} cases']
        lines.append(f'\n{"actions":28} {"done":>6}')
        lines += [f'  {name:26} {count:6d}' for name, count in sorted(self.actions.items())]
        lines.append(f'  {"all":26} {self.actions.total():6d}')
        lines.append(f'\n{"faults":28} {"injected":>8} {"survived":>8}')
        lines += [
            f'  {name:26} {count:8d} {self.survived[name]:8d}'
            for name, count in sorted(self.faults.items())
        ]
        lines.append(f'  {"all":26} {self.faults.total():8d} {self.survived.total():8d}')
        lines.append(f'\nresident memory: {self.growth_mb:+.0f} MB, bound {MAX_GROWTH_MB} MB')
        for case, what, drawn, trace in self.failures:
            lines.append(f'\nFAILED: --seed {self.seed} --case {case}, {what}\n{drawn}\n{trace}')
        lines.append(f'{len(self.failures)} failures')
        return '\n'.join(lines)


def run_case(report: Report, index: int, folder: Path) -> None:
    """One case; a violation ends it and goes into the report."""
    report.cases += 1
    case, what = None, 'construction'
    try:
        case = Case(report.seed, index, folder)
        case.check()
        alive = live_tensors(case)
        # Nor does a case leave anything behind for the next.
        report.alive = alive if report.alive is None else report.alive
        require(alive == report.alive, f'{alive - report.alive} more tensors alive at the start')
        for _ in range(case.rng.randint(3, 6)):
            faulty = case.rng.random() < 0.5
            what = case.rng.choice(list(FAULTS if faulty else ACTIONS))
            # torch's draws do not depend on how many the previous step took.
            torch.manual_seed(case.rng.getrandbits(32))
            (report.faults if faulty else report.actions)[what] += 1
            inject(case, what) if faulty else ACTIONS[what](case)
            case.optimizer.zero_grad()
            case.check()
            reset_masks(case.model)
            now = live_tensors(case)
            require(now == alive, f'{now - alive} more tensors alive than before')
            report.survived[what] += faulty
    except Exception:
        drawn = 'nothing drawn' if case is None else case.describe()
        report.failures.append((index, what, drawn, traceback.format_exc()))


def soak(
    seed: int,
    indices: Iterable[int],
    minutes: float = INF,
    progress: Callable[[Report], None] | None = None,
) -> Report:
    """Run the cases of these numbers, until they or the minutes end.

    Args:
        seed: What all of them follow from.
        indices: Numbers of the cases.
        minutes: No case begins after so many.
        progress: Called after each case.
    """
    report, end = Report(seed), time.monotonic() + 60 * minutes
    init_default_scope('mmseg')
    logger = MMLogger.get_current_instance()
    level = logger.level
    # Initialization logs a line for each weight.
    logger.setLevel('ERROR')
    # What is alive now is not searched after each action.
    gc.collect()
    gc.freeze()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with DefaultScope.overwrite_default_scope('mmseg'):
                for index in indices:
                    if time.monotonic() >= end:
                        break
                    run_case(report, index, Path(folder))
                    report.watch_memory()
                    if progress is not None:
                        progress(report)
    except KeyboardInterrupt:
        print('stopped')
    finally:
        gc.unfreeze()
        logger.setLevel(level)
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--minutes', type=float, default=20)
    parser.add_argument('--seed', type=int, help='default: another one each time')
    parser.add_argument('--case', type=int, help='run this case of the seed alone')
    parser.add_argument('--threads', type=int, default=1, help="torch's; default: 1")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    torch.set_num_threads(args.threads)
    print(f'soak: seed {seed}', flush=True)

    told = 0

    def progress(report: Report) -> None:
        nonlocal told
        for case, what, *_ in report.failures[told:]:
            print(f'failed: case {case}, {what}', flush=True)
        told = len(report.failures)
        if report.cases % 50 == 0:
            state = f'{report.faults.total()} faults, {len(report.failures)} failures'
            print(f'{report.cases} cases, {state}', flush=True)

    cases = itertools.count() if args.case is None else [args.case]
    report = soak(seed, cases, args.minutes, progress)
    print(report)
    return 1 if report.failures else 0


if __name__ == '__main__':
    sys.exit(main())
