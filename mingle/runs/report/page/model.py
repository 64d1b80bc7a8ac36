"""What a page shows, whichever command it is of: groups of rows, each a method, and the course of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mingle.runs.report.numbers import REFERENCES, is_known, mean_of

Values = Sequence[float | None]


@dataclass(frozen=True)
class Course:
    """One merge by one method, in one order of arrival.

    Attributes:
        tasks: names, in order of arrival.
        matrix: ``matrix[i][j]``: the accuracy on task j after merging task i, [T × T]; None where there is
            none.
        unknown: the same where the task has to be found, or empty.
        answers: task → what its samples were taken for, see `mingle.io.manifest.ANSWERS`.
        learned: see `mingle.runs.course`.
        explained: task → where its accuracy went, as `mingle explain` keeps it.
        notes: task → things worth telling.
        skipped: task → why nothing of it was merged.
        folder: of the merged model, as one would name it in a command; None where it was not kept.
    """

    tasks: Sequence[str]
    matrix: Sequence[Values]
    unknown: Sequence[Values] = ()
    answers: Mapping[str, Any] = field(default_factory=dict)
    learned: Mapping[str, Any] = field(default_factory=dict)
    explained: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None

    def accuracy(self, after: int, task: int) -> float | None:
        """The accuracy on a task after merging another, None where it was not measured."""
        value = self.matrix[after][task] if task < len(self.matrix[after]) else None
        return value if is_known(value) else None

    def now(self, task: int) -> float | None:
        """The accuracy on a task after the last merge."""
        return self.accuracy(len(self.tasks) - 1, task)

    def found(self, task: int) -> float | None:
        """The same where the task has to be found too."""
        value = self.unknown[-1][task] if self.unknown else None
        return value if is_known(value) else None

    def lost(self, task: int) -> float | None:
        """How many points the accuracy on a task fell since it was merged."""
        then, now = self.accuracy(task, task), self.now(task)
        return None if then is None or now is None else then - now

    def taken(self, task: int) -> dict[str, float]:
        """Name of a task → the share in per cent of this task's samples that were taken for its own."""
        counts: Mapping[str, int] = self.answers.get(self.tasks[task], {}).get("taken", {})
        total = sum(counts.values())
        return {name: 100 * counts.get(name, 0) / total for name in self.tasks} if total else {}


@dataclass(frozen=True)
class Row:
    """A method, or a method with some of its settings, over several orders of arrival.

    Attributes:
        label: what the row is called.
        method: the name of its method.
        acc, bwt, unknown: per order, in per cent and points; `unknown` is ACC where the task has to be found.
        curves: per order, the mean accuracy over the tasks so far after every merge.
        seconds: of merging, mean over orders.
        size: bytes per task of what is kept beside the base.
        published: of the paper, by ``acc`` and ``bwt``.
        course: of the first order.
        failed: why orders have no result.
    """

    label: str
    method: str
    acc: Values
    bwt: Values
    unknown: Values = ()
    curves: Sequence[Values] = ()
    seconds: float | None = None
    size: float | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    course: Course | None = None
    failed: Sequence[str] = ()

    @property
    def reference(self) -> bool:
        """Whether the method merges nothing."""
        return self.method in REFERENCES


@dataclass(frozen=True)
class Group:
    """Rows that can be compared: of one suite under one protocol."""

    title: str
    rows: Sequence[Row]

    def best(self) -> Row | None:
        """The merging method with the highest ACC; None where none is known."""
        rows = [row for row in self.rows if not row.reference and is_known(mean_of(row.acc))]
        return max(rows, key=lambda row: mean_of(row.acc), default=None)

    def of_method(self, method: str) -> Row | None:
        """The first row of a method."""
        return next((row for row in self.rows if row.method == method), None)


@dataclass(frozen=True)
class Input:
    """A task, and where it came from.

    Attributes:
        task: its name.
        model: SHA-256 of the files of its fine-tuned model.
        file: the file with what is kept of it alone.
        digest: the SHA-256 of that.
        size: in bytes.
        seeds: how many seed samples it was merged with.
        seconds: of merging.
    """

    task: str
    model: str | None = None
    file: str | None = None
    digest: str | None = None
    size: int | None = None
    seeds: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        command: of mingle that the run is of.
        subject: what it was run on.
        groups: one or more.
        facts: names and values of what the numbers depend on.
        inputs: per name of a merge, its tasks.
    """

    command: str
    subject: str
    groups: Sequence[Group]
    facts: Sequence[tuple[str, str]] = ()
    inputs: Mapping[str, Sequence[Input]] = field(default_factory=dict)


def curve(matrix: Sequence[Values]) -> list[float | None]:
    """The mean accuracy over the tasks so far after every merge; None where one of them is not known."""
    means = [mean_of(row[: i + 1]) for i, row in enumerate(matrix)]
    return [value if is_known(value) else None for value in means]
