"""Many edited files read in one process, with limits on the time of each and on the memory of all."""

from __future__ import annotations

import logging
import random
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from targets import REFUSALS, TARGETS, Target

#: seconds for one file
LIMIT = 5.0
#: MiB by which reading may raise the peak of the process's memory
MEMORY = 200
_WARM_UP = 50


class Hung(BaseException):
    """Reading took longer than the limit; no reader catches it."""


@dataclass
class Report:
    """What became of the files.

    Attributes:
        outcomes: how many were read, and how many refused with which error.
        defects: case number → the traceback of any other error.
        seconds: of all of them.
        slowest: the longest time of one, in seconds, and its number.
        growth: of the process's peak memory, in MiB.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    defects: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, -1)
    growth: float = 0.0


def run(name: str, cases: range, seed: int = 0, defects: int = 20) -> Report:
    """Read the edited files of these numbers, up to so many defects; equal numbers make equal files."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        target = TARGETS[name](Path(folder))
        for i in range(_WARM_UP):  # so that imports and caches do not count
            _outcome(target, random.Random(f"warm-up {i}"))
        with suppress(OSError):  # only Linux can: the peak so far is forgotten
            Path("/proc/self/clear_refs").write_text("5")
        before, begun = _peak(), time.perf_counter()
        for i in cases:
            start = time.perf_counter()
            outcome, defect = _outcome(target, random.Random(f"{name} {seed} {i}"))
            report.slowest = max(report.slowest, (time.perf_counter() - start, i))
            growth = _peak() - before
            if growth > max(MEMORY, report.growth):
                defect = defect or f"{growth:.0f} MiB"
            report.growth = growth
            report.outcomes[outcome] += 1
            if defect is not None:
                report.defects[i] = defect
                if len(report.defects) == defects:
                    break
        report.seconds = time.perf_counter() - begun
    return report


def _outcome(target: Target, chance: random.Random) -> tuple[str, str | None]:
    """The outcome's name, and the traceback where it is a defect."""
    read = target(chance)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        read()
    except REFUSALS as error:
        return type(error).__name__, _unreadable(str(error))
    except (Exception, Hung) as error:
        return type(error).__name__, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read", None


def _unreadable(message: str) -> str | None:
    """What is wrong with a refusal's text."""
    if len(message) > 10_000:
        return f"a message of {len(message)} characters: {message[:300]!r} …"
    # UTF-8 has no form for half of a surrogate pair.
    return f"not printable: {message!r}" if any("\ud800" <= c <= "\udfff" for c in message) else None


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and logs, and with an alarm that raises `Hung`."""

    def hung(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        signal.signal(signal.SIGALRM, before)
