"""Processes that tests start: what they print is shown where the test fails."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(
    command: Sequence[Any],
    expect: int | None = 0,
    env: Mapping[str, str | None] | None = None,
    limit: float = 600,
    **options: Any,
) -> subprocess.CompletedProcess:
    """Run a command to its end, in this environment and what ``env`` adds to it.

    Its output is repeated on this process's, of which pytest shows what belongs to a failing test.

    Args:
        command (Sequence): The program and its arguments.
        expect (int, optional): The exit status; None if any will do.
        env (Mapping, optional): Variables beside those of this process; None takes one away.
        limit (float): Seconds after which it is killed, which fails the test.
        **options: For ``subprocess.run``, as ``cwd``.

    Raises:
        AssertionError: If it ends otherwise or not in time, with all that it printed.
    """
    command = [str(part) for part in command]
    captured = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    variables = {**os.environ, **(env or {})}
    variables = {name: value for name, value in variables.items() if value is not None}
    options = {**captured, **options, 'env': variables}
    try:
        done = subprocess.run(command, text=True, timeout=limit, **options)
        ended = f'exit status {done.returncode}'
    except subprocess.TimeoutExpired as error:
        # Bytes or text by the version of Python.
        out, err = (
            part.decode(errors='replace') if isinstance(part, bytes) else part
            for part in (error.stdout, error.stderr)
        )
        done = subprocess.CompletedProcess(command, None, out, err)
        ended = f'not done after {limit} s'
    shown = report(command, ended, done.stdout, done.stderr)
    print(shown)
    if done.returncode is None or expect is not None and done.returncode != expect:
        raise AssertionError(f'wanted exit status {expect}:\n{shown}')
    return done


def run_python(*arguments: Any, **options: Any) -> subprocess.CompletedProcess:
    """Like :func:`run`: this Python, where this checkout is found first."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    env = {'PYTHONPATH': path, **(options.pop('env', None) or {})}
    return run([sys.executable, *arguments], env=env, **options)


def report(command: Sequence[str], ended: str, *outputs: str | None) -> str:
    """What a process was, how it ended and what it printed."""
    # Programs that tests write for a process are long.
    words = ' '.join(word if len(word) < 200 else f'{word[:200]}...' for word in command)
    parts = [f'{words}\n{ended}']
    for name, text in zip(('stdout', 'stderr'), outputs):
        if text:
            parts.append(f'--- its {name} ---\n{text}')
    return '\n'.join(parts)
