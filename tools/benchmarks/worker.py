"""A process for measurements that may crash without affecting the others."""

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class Worker:
    """Runs functions one after another in a separate process.

    The process is started for the first function and reused for the following ones. After a
    function raises, ends the process or exceeds its limit, the next one gets a fresh process,
    because an error can leave a GPU context unusable.
    """

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> 'Worker':
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stop()

    def run(self, function: Callable[..., Any], *args: Any, limit: float) -> tuple[Any, str | None]:
        """Call a function in that process.

        Args:
            function: A function of a module, sent by its name.
            args: Its arguments. They and the result must be picklable.
            limit: Seconds it may take.

        Returns:
            tuple: Its result and None, or None and what went wrong in one line.
        """
        if self._process is None:
            self._start()
        self._connection.send((function, args))
        if not self._connection.poll(limit):
            return self._failed(f'not done after {limit:g} s')
        try:
            result, error = self._connection.recv()
        except EOFError:
            self._process.join()
            return self._failed(f'the process ended with exit code {self._process.exitcode}')
        return (result, None) if error is None else self._failed(error)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        context = torch.multiprocessing.get_context('spawn')
        self._connection, theirs = context.Pipe()
        # Not a daemon: torch.compile starts its own processes.
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def _failed(self, error: str) -> tuple[None, str]:
        self.stop()
        return None, error


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = function(*args), None
        except Exception as error:
            traceback.print_exc()
            answer = None, in_one_line(error)
        connection.send(answer)


def in_one_line(error: Exception, width: int = 160) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0]}'[:width]
