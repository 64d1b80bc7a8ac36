"""The interface for following a run, as the progress bars of the command line do."""

from __future__ import annotations

from collections.abc import Sequence

from mingle.adaptation.trace import StepProgress
from mingle.merging.evaluate import Result
from mingle.merging.parts import PartsProgress


class Observer:
    """Told how a run is getting on; does nothing by itself."""

    def merging(self, method: str, order: int, index: int, tasks: Sequence[str]) -> None:
        """Task `index` of the order is about to be merged."""

    def adapting(self, progress: StepProgress) -> None:
        """An adaptation step is done."""

    def streaming(self, progress: PartsProgress) -> None:
        """A part of a model that is merged from files is done."""

    def training(self, task: str, step: int, steps: int) -> None:
        """An expert of the suite is being trained, as it does not ship with the package."""

    def merged(self, method: str, order: int, result: Result) -> None:
        """All tasks are merged and evaluated."""
