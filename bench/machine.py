"""What is read from the machine meanwhile: others on the CPUs, memory held, and seconds by stage."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

#: CPUs used by others from which timings are called disturbed
MUCH = 0.2


class LoadMeter:
    """How many CPUs other processes keep busy from its making on."""

    def __init__(self) -> None:
        self._began, self._start = time.monotonic(), self._others()

    def others(self) -> float | None:
        """Busy CPUs on average, ours not counted; None where the system does not tell."""
        now, passed = self._others(), max(time.monotonic() - self._began, 1e-9)
        return None if now is None or self._start is None else max(0.0, (now - self._start) / passed)

    @staticmethod
    def _others() -> float | None:
        """CPU seconds that everyone else has used, and those that a hypervisor has taken."""
        try:
            first = Path("/proc/stat").read_text().split("\n", 1)[0]
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, first.split()[1:])
        except (OSError, ValueError):
            return None
        own = os.times()
        total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return total - (own.user + own.system + own.children_user + own.children_system)


class PeakMemory:
    """The most bytes held since its making, beyond what was held then; None where the system does not tell.

    On a GPU what PyTorch's allocator has handed out, on a CPU the process's resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what comes
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
            self.before = _size("/proc/self/status", "VmRSS")
        except (OSError, AttributeError):
            pass

    def grown(self) -> int | None:
        if self.before is None:
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return max(0, torch.cuda.max_memory_allocated(self.device) - self.before)
        return max(0, _size("/proc/self/status", "VmHWM") - self.before)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most that one call holds beyond what was allocated before it, outputs included.

    On CPUs from the profiler's record of PyTorch's allocator; workspaces inside MKL and oneDNN do not show.
    """
    if device.type == "cuda":
        peak, _ = PeakMemory(device), run()
        return peak.grown()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it announces every start and stop on stderr
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profiler:
            outputs = run()
        events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    except (AttributeError, RuntimeError):  # not public API
        return None
    del outputs
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(changes, initial=0))


def available(device: torch.device) -> float:
    """Free bytes of memory; infinite where the system does not tell."""
    try:
        cuda = device.type == "cuda"
        return torch.cuda.mem_get_info(device)[0] if cuda else _size("/proc/meminfo", "MemAvailable")
    except (OSError, StopIteration):
        return math.inf


def _size(path: str, key: str) -> int:
    """A size in bytes from a file in which the system tells kilobytes by key."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


STAGES = ("load", "project", "decompose", "adapt", "subspace", "evaluate")


class Stopwatch:
    """Seconds by stage; a stage within another one takes its time from it, so that no second counts twice."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(STAGES, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._account()
        self._running.append(stage)
        try:
            yield
        finally:
            self._account()
            self._running.pop()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _account(self) -> None:
        """Put what has passed to the account of the running stage."""
        before, self._since = self._since, self.now()
        if self._running:
            self.seconds[self._running[-1]] += self._since - before
