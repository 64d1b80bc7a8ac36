"""Seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
