"""Every step of a process that changes files, so that a test can end or break it at each.

The steps are: opening a file for writing, writing, syncing, renaming, removing, making a folder.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forks import fork

from mingle.io import files

#: called with the number and the kind of a step before it is taken
Act = Callable[[int, str], object]
_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
REMOVING = ("remove", "rmdir")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(root: Path, act: Act) -> None:
    """Call `act` before each step below `root`; for good, so this is for child processes."""
    numbers = itertools.count()

    def below(path: Any) -> bool:
        """Descriptors, and names relative to one, are of folders below."""
        return isinstance(path, int) or not os.path.isabs(path) or Path(path).is_relative_to(root)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            writes = not isinstance(arguments[0], int) and arguments[2] & _WRITING
            if writes and Path(os.fsdecode(arguments[0])).is_relative_to(root):
                act(next(numbers), "open")
        elif event in _EVENTS and below(arguments[0]):
            act(next(numbers), event.removeprefix("os."))

    class Watched(io.BufferedWriter):
        def write(self, data: Any) -> int:
            act(next(numbers), "write")
            return super().write(data)

    def opening(path: Any, mode: str) -> Any:
        return Watched(io.FileIO(path, mode.replace("b", ""))) if "x" in mode else open(path, mode)

    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        act(next(numbers), "fsync")
        fsync(descriptor)

    sys.addaudithook(hook)
    os.fsync = syncing
    files.open = opening  # type: ignore[attr-defined]


def killing(at: int) -> Act:
    """Dies at the step of this number."""
    return lambda number, kind: number == at and os.kill(os.getpid(), signal.SIGKILL)


def failing(at: int, code: int) -> Act:
    """Raises the `OSError` of this code from the step of this number on; only removing still works."""

    def act(number: int, kind: str) -> None:
        if number >= at and kind not in REMOVING:
            raise OSError(code, os.strerror(code))

    return act


def ends(root: Path, command: Callable[[], int], act: Act) -> int:
    """How a child ends that carries out `command` while `act` is called: its code, or minus a signal."""

    def watched(_: object) -> None:
        watch(root, act)
        os._exit(command())

    return os.waitstatus_to_exitcode(os.waitpid(fork(watched), 0)[1])


def kinds(root: Path, command: Callable[[], int]) -> list[str]:
    """The kinds of the steps of a command, which a child carries out."""
    reading, writing = os.pipe()
    assert ends(root, command, lambda number, kind: os.write(writing, f"{kind}\n".encode())) == 0
    os.close(writing)
    with open(reading) as file:
        return file.read().split()


def few(steps: list[str]) -> list[int]:
    """The numbers of all steps but those inside a run of writes, which are to one file."""
    return [i for i in range(len(steps)) if steps[max(i - 1, 0) : i + 2] != ["write"] * 3]


def some(steps: list[str]) -> list[int]:
    """A third of the `few`."""
    return few(steps)[::3]


def every(steps: list[str]) -> list[int]:
    """The numbers of all steps."""
    return list(range(len(steps)))
