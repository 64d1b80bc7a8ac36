"""Progress bars: one for the tasks of all methods and orders, one for the steps inside a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from mingle.adaptation.trace import StepProgress
from mingle.cli.output import console, percent, points
from mingle.merging.evaluate import Result
from mingle.runs.observer import Observer
from mingle.text import visible


@contextmanager
def bars(runs: int) -> Iterator[Observer]:
    """A block with bars for `runs` merges, each of all tasks by one method in one order."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield _Bars(progress, runs)


class _Bars(Observer):
    def __init__(self, progress: Progress, runs: int) -> None:
        self.progress, self.runs, self.begun = progress, runs, 0
        self.tasks = progress.add_task("starting", total=None, note="")
        self.inner = progress.add_task("", total=None, note="", visible=False)

    def merging(self, method: str, order: int, index: int, tasks: Sequence[str]) -> None:
        self.begun = max(self.begun, index)  # an earlier run may have merged the first tasks
        self.progress.update(
            self.tasks,
            description=f"{method}, order {order + 1}",
            total=self.runs * len(tasks),
            completed=self.begun,
            note=visible(tasks[index]),
        )
        self.progress.update(self.inner, visible=False)
        self.begun += 1

    def adapting(self, progress: StepProgress) -> None:
        note = f"loss {progress.loss:.3f}"
        if progress.strength is not None:
            note += f"  S {progress.interference:.3f}  λ {progress.strength:.3f}"
        self._inside("  adapting", progress.step, progress.steps, note)

    def training(self, task: str, step: int, steps: int) -> None:
        self._inside(f"  training the expert {visible(task)} (once, then cached)", step, steps)

    def _inside(self, description: str, done: int, total: int, note: str = "") -> None:
        self.progress.update(
            self.inner, description=description, visible=True, total=total, completed=done, note=note
        )

    def merged(self, method: str, order: int, result: Result) -> None:
        self.progress.update(self.tasks, completed=self.begun)
        figures = f"ACC {percent(result.acc)}, BWT {points(result.bwt)}"
        self.progress.console.print(f"{method}, order {order + 1}: {figures}")
