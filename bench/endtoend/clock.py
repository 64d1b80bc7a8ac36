"""Seconds by stage, and the most memory that a block of code took."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STAGES = ("load", "project", "decompose", "adapt", "subspace", "evaluate")
_OWN = "/proc/self/status"


class Stopwatch:
    """Seconds by stage; a stage within another one takes its time from it, so that no second counts twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._turn()
        self._running.append(stage)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        """Put what has passed to the account of the running stage."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


class PeakMemory:
    """The most bytes held since its making, beyond what was held then.

    On a GPU what PyTorch's allocator has handed out, on a CPU the process's resident memory; None where the
    system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
            return
        self.before = None
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what comes
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
            self.before = _size(_OWN, "VmRSS")
        except (OSError, AttributeError):
            pass

    def grown(self) -> int | None:
        if self.before is None:
            return None
        peak = (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else _size(_OWN, "VmHWM")
        )
        return max(0, peak - self.before)


def available(device: torch.device) -> float:
    """Bytes of memory that could still be had; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _size("/proc/meminfo", "MemAvailable")
    except (OSError, StopIteration):
        return math.inf


def _size(path: str, key: str) -> int:
    """A size in bytes from a file in which the system tells kilobytes by key."""
    return (
        next(
            int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:")
        )
        * 1024
    )
