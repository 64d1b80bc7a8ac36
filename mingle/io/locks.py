"""One writer of a folder at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from mingle.io.files import CheckpointError, naming


class Locked(CheckpointError):
    """Another process is the writer of a folder."""


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only writer of an existing folder; while another process is, `wait` or raise `Locked`.

    The error names the holder. The lock is the kernel's, on `.lock` in the folder: a killed holder releases
    it, and the file itself stays behind.
    """
    path = folder / ".lock"
    with naming(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with naming(path):
            _flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), folder)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            os.ftruncate(descriptor, 0)
            os.pwrite(
                descriptor,
                json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode(),
                0,
            )
        try:
            yield
        finally:
            # Closing would not be enough: a child forked meanwhile shares the lock and would keep it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def refuse_locked(folder: Path) -> None:
    """Raise `Locked` where another process is the writer of `folder`; nothing is written."""
    path = folder / ".lock"
    if path.is_file():
        with naming(path), open(path, "rb") as file:
            _flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, folder)


def _flock(descriptor: int, operation: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        holder = _holder(os.pread(descriptor, 4096, 0))
        advice = "wait until that has ended, or end it: what it saved is kept"
        raise Locked(f"{folder}: being written by {holder}; {advice}") from None


def _holder(text: bytes) -> str:
    """Who a lock file says holds it; the holder may not have written it yet."""
    try:
        holder = json.loads(text)
        return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
