"""How a command is getting on: bars in a terminal, lines in a file or a pipe, nothing with ``--quiet``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from mingle import ranks
from mingle.adaptation.trace import StepProgress
from mingle.cli.output import console, has_bars, is_quiet, percent, points, say
from mingle.merging.evaluate import Result
from mingle.merging.parts import PartsProgress
from mingle.runs.observer import Observer
from mingle.text import visible

#: seconds between the lines of one stage
_PAUSE = 10.0


@contextmanager
def bars(runs: int) -> Iterator[Observer]:
    """A block with bars for `runs` merges, each of all tasks by one method in one order.

    One counts the tasks of all methods and orders, one the steps inside a task.
    """
    if not has_bars():
        yield Observer() if is_quiet() else _Lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield _Bars(progress, runs)


@contextmanager
def stages(first: str) -> Iterator[Callable[[str], None]]:
    """A block that says which stage it is in, first of all `first`; whatever it yields is told the next."""
    if not has_bars():
        yield say
        return
    with console.status(visible(first)) as status:
        yield lambda stage: status.update(visible(stage))


class _Lines(Observer):
    """A line for each task that is merged, and of a long stage inside it one now and then."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.next_line = self.began + _PAUSE
        self.trained: str | None = None

    def merging(self, method: str, order: int, index: int, tasks: Sequence[str]) -> None:
        self._say(f"{method}, order {order + 1}, task {index + 1} of {len(tasks)}: {tasks[index]}")

    def adapting(self, progress: StepProgress) -> None:
        self._say_now_and_then(f"adapting, step {progress.step} of {progress.steps}, {_measures(progress)}")

    def streaming(self, progress: PartsProgress) -> None:
        self._say_now_and_then(f"{_pass(progress)}, {_bytes(progress)}")

    def training(self, task: str, step: int, steps: int) -> None:
        text = f"training the expert {task} (once, then cached), step {step} of {steps}"
        self._say_now_and_then(text, first=task != self.trained)
        self.trained = task

    def merged(self, method: str, order: int, result: Result) -> None:
        self._say(_figures(method, order, result))

    def _say_now_and_then(self, text: str, first: bool = False) -> None:
        if first or time.monotonic() >= self.next_line:
            self._say(f"  {text}")

    def _say(self, text: str) -> None:
        """The time passed since the beginning, in hours, minutes and seconds, and the text."""
        now = time.monotonic()
        self.next_line = now + _PAUSE
        say(f"[{timedelta(seconds=int(now - self.began))}] {text}")


def _figures(method: str, order: int, result: Result) -> str:
    return f"{method}, order {order + 1}: ACC {percent(result.acc)}, BWT {points(result.bwt)}"


def _measures(progress: StepProgress) -> str:
    found = f"loss {progress.loss:.3f}"
    if progress.strength is not None:
        found += f"  S {progress.interference:.3f}  λ {progress.strength:.3f}"
    return found


def _pass(progress: PartsProgress) -> str:
    return f"merging from files, pass {progress.number}"


def _bytes(progress: PartsProgress) -> str:
    """What is done, and of what; of several processes this one speaks of its own part."""
    own = f", the part of one process of {ranks.size()}" if ranks.size() > 1 else ""
    return f"{progress.done / 1e9:.2f} of {progress.total / 1e9:.2f} GB{own}"


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
        self._inside("  adapting", progress.step, progress.steps, _measures(progress))

    def streaming(self, progress: PartsProgress) -> None:
        share = round(100 * progress.done / max(progress.total, 1))
        self._inside(f"  {_pass(progress)}, per cent", share, 100, _bytes(progress))

    def training(self, task: str, step: int, steps: int) -> None:
        self._inside(f"  training the expert {visible(task)} (once, then cached)", step, steps)

    def _inside(self, description: str, done: int, total: int, note: str = "") -> None:
        self.progress.update(
            self.inner, description=description, visible=True, total=total, completed=done, note=note
        )

    def merged(self, method: str, order: int, result: Result) -> None:
        self.progress.update(self.tasks, completed=self.begun)
        self.progress.console.print(_figures(method, order, result))
