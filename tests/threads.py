"""Two threads in a fixed order: one pauses inside f while the other runs."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import nn

# Only a failing test waits this long.
_LIMIT = 60


@contextmanager
def standing_in(module: nn.Module, call: Callable[[], Any], visit: int = 1) -> Iterator[Future]:
    """Run ``call`` in a thread that stands still in ``module`` as long as the body runs.

    Args:
        module: What the call goes through.
        call: The thread's work.
        visit: The call of ``module``, counted from 1, before which the thread stands still.

    Yields:
        Future: The result of ``call``; to be asked for after the body.
    """
    inside, leave = threading.Event(), threading.Event()
    visits = {}

    def gate(*_: Any) -> None:
        thread = threading.current_thread()
        if not thread.name.startswith('standing'):
            return
        visits[thread] = visits.get(thread, 0) + 1
        if visits[thread] == visit:
            inside.set()
            assert leave.wait(_LIMIT)

    handle = module.register_forward_pre_hook(gate)
    with ThreadPoolExecutor(1, thread_name_prefix='standing') as pool:
        future = pool.submit(call)
        # A call that fails before that point is not waited for.
        future.add_done_callback(lambda _: inside.set())
        try:
            assert inside.wait(_LIMIT) and not future.done(), 'the call never came to the module'
            yield future
        finally:
            leave.set()
            handle.remove()
