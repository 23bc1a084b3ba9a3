"""Train the rows of a study with several seeds, and report the results.

    python tools/studies/study.py recipes --list
    python tools/studies/study.py recipes --data-root DATA --jobs 2
    python tools/studies/study.py recipes --data-root DATA --time 3
    python tools/studies/study.py recipes --table --plot

Each run is a process of one thread with a log of its own. A finished run is a JSON file under
--out and is not trained again; an interrupted one goes on from its last checkpoint under
--work-dir. The data are images in class folders, DATA/train/CLASS/* and DATA/test/CLASS/*.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from _records import REMEDY, TIMES, is_there, read_json, settings_of, write_json
from _studies import STUDIES, Row, Study

# Iterations of a round of --time: enough that drawn budgets and penalties have their mean.
TIMED = 40


@dataclass(frozen=True)
class Job:
    """A row with a seed."""

    row: str
    seed: int

    @property
    def name(self) -> str:
        return f'{self.row}_seed{self.seed}'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('study', choices=STUDIES, help='what to compare')
    parser.add_argument(
        '--list', action='store_true', help='list the rows and how many runs of each are finished'
    )
    parser.add_argument(
        '--time',
        type=int,
        metavar='ROUNDS',
        help='time iterations of the rows in turn, so many rounds; the table compares them',
    )
    parser.add_argument('--table', action='store_true', help='print a table of the finished runs')
    parser.add_argument(
        '--plot',
        nargs='?',
        const='',
        metavar='FILE',
        help='draw a chart of the finished runs (without FILE: OUT/STUDY/STUDY.png)',
    )
    parser.add_argument('--rows', nargs='+', metavar='ROW', help='these rows alone')
    parser.add_argument('--seeds', type=int, nargs='+', help="in place of the study's")
    parser.add_argument('--epochs', type=int, help="in place of the study's")
    parser.add_argument('--data-root', help="folder of the images (default: the configs')")
    parser.add_argument(
        '--jobs',
        type=int,
        default=2,
        help='runs at a time; 0 runs one after another in this process',
    )
    parser.add_argument('--out', default='docs/studies', help='where results are')
    parser.add_argument('--work-dir', default='work_dirs/studies', help='checkpoints and logs')
    args = parser.parse_args(argv)
    study = STUDIES[args.study]
    unknown = [row for row in args.rows or () if row not in study.rows]
    if unknown:
        parser.error(f'--rows {" ".join(unknown)}: {args.study} has {", ".join(study.rows)}')
    if args.jobs < 0 or (args.epochs is not None and args.epochs < 1):
        parser.error('--jobs must be at least 0 and --epochs at least 1')
    if args.time is not None:
        if args.time < 1 or args.list or args.table or args.plot is not None:
            parser.error('--time must be at least 1, and goes without --list, --table and --plot')
        if study.baseline is None:
            parser.error(f'--time: {args.study} has no row that the others are compared with')
    return args


def jobs_of(study: Study, args: argparse.Namespace) -> list[Job]:
    """The runs that the command line asks for, seed by seed, so that every row starts early."""
    seeds = study.seeds if args.seeds is None else args.seeds
    return [Job(row, seed) for seed in seeds for row in args.rows or study.rows]


def result_of(job: Job, args: argparse.Namespace) -> Path:
    """The file of a finished run."""
    return Path(args.out) / args.study / f'{job.name}.json'


def epochs_of(job: Job, study: Study, args: argparse.Namespace) -> int:
    """Epochs of a run.

    Raises:
        FileNotFoundError: If it depends on runs that are not finished.
    """
    epochs = study.epochs if args.epochs is None else args.epochs
    if study.rows[job.row].time_of is None:
        return epochs
    whole, own = (result_of(Job(name, job.seed), args) for name in study.rows[job.row].time_of)
    for path in (whole, own):
        if not path.is_file():
            raise FileNotFoundError(f'{job.name} is to take as long as others: no {path}')
    per_epoch = read_json(own)['cpu_seconds'] / read_json(own)['epochs']
    return max(1, round(read_json(whole)['cpu_seconds'] / per_epoch))


def is_done(job: Job, study: Study, args: argparse.Namespace) -> bool:
    """Tell whether a run is finished.

    Raises:
        FileNotFoundError: If it depends on runs that are not finished.
        ValueError: If its file is of a run with other settings.
    """
    settings = settings_of(study, study.rows[job.row], job.seed, epochs_of(job, study, args))
    return is_there(result_of(job, args), settings, REMEDY)


def train(job: Job, study: Study, args: argparse.Namespace) -> None:
    """Carry out a run in this process."""
    from _single_run import run

    work_dir = Path(args.work_dir) / args.study / job.name
    epochs = epochs_of(job, study, args)
    row = study.rows[job.row]
    run(study, row, job.seed, epochs, args.data_root, work_dir, result_of(job, args))


def time_rows(study: Study, args: argparse.Namespace) -> None:
    """Time the rows in turn, and write the CPU seconds that an iteration of each takes.

    Of each iteration it is the least of all rounds, so that a busy machine matters little; over the
    iterations it is the mean, since some draw more evaluations, or a penalty, than others. Rows
    that were timed before on such a machine stay in the file.
    """
    from _single_run import processor, time_iterations, versions

    path = Path(args.out) / args.study / TIMES
    machine = dict(processor=processor(), versions=versions())
    kept = read_json(path) or {}
    if kept and any(kept.get(key) != value for key, value in machine.items()):
        print(f'{path} is of another machine or other versions: its rows are left out')
        kept = {}
    rows = {name: study.rows[name] for name in args.rows or study.rows}
    least: dict[str, list[float]] = {}
    for number in range(1, args.time + 1):
        for name, row in rows.items():
            settings = timed_settings(study, row)
            with tempfile.TemporaryDirectory() as folder:
                seconds = time_iterations(row, settings, args.data_root, Path(folder), TIMED)
            least[name] = [min(pair) for pair in zip(seconds, least.get(name, seconds))]
            print(f'round {number}, {name}: {mean(seconds):.3f} s an iteration', flush=True)
            kept.setdefault('rows', {})[name] = dict(
                settings, seconds=mean(least[name]), iterations=len(seconds), rounds=number
            )
        write_json(path, {**kept, **machine})


def timed_settings(study: Study, row: Row) -> dict[str, Any]:
    """The settings that identify what is timed."""
    return settings_of(study, row, seed=0, epochs=1)


def read_times(study: Study, path: Path) -> dict[str, float]:
    """CPU seconds of an iteration of each row that was timed with the settings it has now."""
    found = (read_json(path) or {}).get('rows', {})
    times = {}
    for name, row in study.rows.items():
        if timed_settings(study, row).items() <= found.get(name, {}).items():
            times[name] = found[name]['seconds']
    return times


class Processes:
    """Runs in processes of their own, some at a time.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._running: set[subprocess.Popen] = set()
        self._stopped = False
        # Either a started process is among the running ones, or nothing is started any more.
        self._starting = threading.Lock()

    def do(self, jobs: Sequence[Job]) -> list[Job]:
        """Run all of them and return those that failed. If stopped, stop those that run."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                return [job for job, done in zip(jobs, pool.map(self._do, jobs)) if not done]
            finally:
                with self._starting:
                    self._stopped = True
                    for process in self._running:
                        process.terminate()

    def _do(self, job: Job) -> bool:
        args = self.args
        log = Path(args.work_dir) / args.study / f'{job.name}.log'
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, args.study, '--jobs', '0', '--rows', job.row]
        command += ['--seeds', str(job.seed), '--out', args.out, '--work-dir', args.work_dir]
        for flag, value in (('--epochs', args.epochs), ('--data-root', args.data_root)):
            command += [] if value is None else [flag, str(value)]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive'}
        with log.open('a') as file:
            with self._starting:
                if self._stopped:
                    return False
                print(f'{job.name}: log in {log}', flush=True)
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment
                )
                self._running.add(process)
            code = process.wait()
        with self._starting:
            self._running.discard(process)
            # One that was stopped has not failed.
            if not self._stopped:
                told = 'done' if code == 0 else f'failed, exit status {code}'
                print(f'{job.name}: {told}', flush=True)
        return code == 0


def train_all(jobs: Sequence[Job], study: Study, args: argparse.Namespace) -> None:
    """Carry out all unfinished runs; those that depend on the time of others come last.

    Raises:
        SystemExit: If a result is of other settings, a run depends on others that are not
            finished, or one failed: then all others are done nevertheless.
    """
    failed: list[Job] = []
    for dependent in (False, True):
        if dependent and failed:
            break
        phase = [job for job in jobs if (study.rows[job.row].time_of is not None) == dependent]
        try:
            phase = [job for job in phase if not is_done(job, study, args)]
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f'study.py: {error}')
        if args.jobs:
            failed += Processes(args).do(phase)
            continue
        for job in phase:
            train(job, study, args)
    if failed:
        names = ', '.join(job.name for job in failed)
        sys.exit(f'study.py: failed: {names}. The logs are in {args.work_dir}/{args.study}.')


def show_rows(study: Study, jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """Print the rows, how many runs of each are finished, and their time."""
    print(f'{study.title}. {args.epochs or study.epochs} epochs.')
    for name in dict.fromkeys(job.row for job in jobs):
        paths = [result_of(job, args) for job in jobs if job.row == name]
        times = [read_json(p)['cpu_seconds'] / 60 for p in paths if p.is_file()]
        took = f', {mean(times):.1f} CPU minutes each' if times else ''
        print(f'{name}: {study.rows[name].title}: {len(times)} of {len(paths)} done{took}')


def main(argv: list[str] | None = None) -> None:
    """Do what the command line asks for."""
    args = parse_args(argv)
    study = STUDIES[args.study]
    jobs = jobs_of(study, args)
    if args.list:
        show_rows(study, jobs, args)
    elif args.time:
        time_rows(study, args)
    elif args.table or args.plot is not None:
        from _report import chart, read_results, table

        runs = read_results(study, Path(args.out) / args.study)
        runs = {name: row for name, row in runs.items() if name in (args.rows or study.rows)}
        if not runs:
            sys.exit(f'study.py: no finished runs in {Path(args.out) / args.study}')
        if args.table:
            print(table(study, runs, read_times(study, Path(args.out) / args.study / TIMES)))
        if args.plot is not None:
            path = Path(args.plot or Path(args.out) / args.study / f'{args.study}.png')
            path.parent.mkdir(parents=True, exist_ok=True)
            chart(study, runs).savefig(path, dpi=120)
            print(path)
    else:
        # Like Ctrl-C: running processes are stopped as well, and continue the next time.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            train_all(jobs, study, args)
        except KeyboardInterrupt:
            sys.exit('study.py: stopped; the same command continues')


if __name__ == '__main__':
    main()
