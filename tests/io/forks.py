"""Child processes that say when they are ready, and how they end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

Ready = Callable[[], object]


def fork(task: Callable[[Ready], object]) -> int:
    """Start `task` in a child process; return its pid once the task has called its argument, or has ended.

    The child exits with 0 when the task returns and 1 when it raises; an alarm ends it if the test does not.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(30)
            task(lambda: os.write(writing, b"!"))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
