"""One writer of a folder at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from mingle.io.files import CheckpointError, naming


class Locked(CheckpointError):
    """Another process is the writer of a folder."""


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only writer of an existing folder; while another process is, `wait` or raise `Locked`.

    The error names the holder.  The lock is the kernel's, on `.lock` in the folder: a killed holder releases
    it.  The file goes with the lock, and what a killed holder has left of it, the next one takes over.
    """
    path = folder / ".lock"
    with naming(path):
        descriptor = _locked(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        with naming(path):
            since = datetime.now(UTC).isoformat(timespec="seconds")
            os.ftruncate(descriptor, 0)
            os.pwrite(
                descriptor,
                json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode(),
                0,
            )
        yield
    finally:
        try:
            with suppress(OSError):  # the folder has moved, or cannot be written any more
                if _is_at(descriptor, path):
                    path.unlink()
        finally:
            # Closing would not be enough: a child forked meanwhile shares the lock and would keep it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def refuse_locked(folder: Path) -> None:
    """Raise `Locked` where another process is the writer of `folder`; nothing is written."""
    path = folder / ".lock"
    if path.is_file():
        with naming(path), open(path, "rb") as file:
            _flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, folder)


def _locked(path: Path, operation: int) -> int:
    """The descriptor of a lock file that is locked, and that no earlier holder has removed meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, operation, path.parent)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


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
