"""Tables whose cells are coloured by their values, each with the words that say what a cell is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mingle.runs.course import block_of
from mingle.runs.report.numbers import is_known, number
from mingle.runs.report.page.model import Course, Values

#: how many colours there are from the least to the most, and on each side of nothing
LEVELS, SIDES = 10, 4
#: the most cells of a map of layers
_MOST_CELLS = 1000


@dataclass(frozen=True)
class Cell:
    """A value.

    Attributes:
        shown: the text; empty where there is none.
        level: the class of its colour.
    """

    shown: str = ""
    level: str = ""


@dataclass(frozen=True)
class Heat:
    """A coloured table.

    Attributes:
        caption: what it shows.
        corner: what rows and columns are.
        words: of a cell; ``{row}``, ``{column}`` and ``{value}`` stand for its names and its value.
        rows, columns: their names.
        cells: row by row.
        first: the number of every row, empty without numbers.
        heads: the number of every column, empty without numbers.
    """

    caption: str
    corner: str
    words: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell]]
    first: Sequence[int] = ()
    heads: Sequence[int] = ()


def accuracies(course: Course) -> Heat | None:
    """The accuracy on every task (column) after every merge (row); None where nothing was measured."""
    count = len(course.tasks)
    rows = [[course.accuracy(i, j) for j in range(count)] for i in range(count)]
    if not any(is_known(value) for row in rows for value in row):
        return None
    return _of_tasks(
        "Accuracy in per cent on every task after every merge",
        "after merging ↓ on task →",
        "accuracy on task {column} after merging task {row}: {value} %",
        course,
        rows,
    )


def taken(course: Course) -> Heat | None:
    """Which task's samples (row) went to which task (column), in per cent; None where it is not known."""
    shares = [course.taken(task) for task in range(len(course.tasks))]
    if len(course.tasks) < 2 or not any(shares):
        return None
    rows = [[share.get(name) for name in course.tasks] for share in shares]
    return _of_tasks(
        "Where the samples of every task went when nobody named the task, in per cent",
        "samples of ↓ taken for →",
        "{value} % of the samples of task {row} were taken for task {column}",
        course,
        rows,
    )


def gates(course: Course) -> Heat | None:
    """Every expert's gate (column) on the samples of every task (row), mean over layers."""
    found = course.learned.get("gates")
    if not found or not found["experts"]:
        return None
    bound = max((abs(value) for row in found["mean"] for value in row if is_known(value)), default=0.0)
    return Heat(
        "Gates after the last merge: mean over layers",
        "samples of ↓ expert of →",
        "the gate of the expert of task {column} on samples of task {row}: {value}",
        found["tasks"],
        found["experts"],
        [[_signed(value, bound) for value in row] for row in found["mean"]],
        _numbers(course, found["tasks"]),
        _numbers(course, found["experts"]),
    )


def own_gates(course: Course) -> Heat | None:
    """How far a task's own expert (column) stands out in every layer (row), or block if there are many."""
    found = course.learned.get("gates")
    if not found or len(found["experts"]) < 2 or not found["layers"]:
        return None
    names, rows, of_blocks = found["layers"], found["own"], False
    if len(names) * len(found["experts"]) > _MOST_CELLS:
        names, rows, of_blocks = *_by_block(names, rows), True
    bound = max((abs(value) for row in rows for value in row if is_known(value)), default=0.0)
    return Heat(
        "Gates by layer: a task's own expert on its samples, less the mean of the others"
        + (" (means over the layers of a block)" if of_blocks else ""),
        "layer ↓ task →",
        "in {row}, the gate of the own expert of task {column} is above the mean of the others by {value}",
        names,
        found["experts"],
        [[_signed(value, bound) for value in row] for row in rows],
        (),
        _numbers(course, found["experts"]),
    )


def _of_tasks(caption: str, corner: str, words: str, course: Course, rows: Sequence[Values]) -> Heat:
    cells = [[_percent(value) for value in row] for row in rows]
    numbers = range(1, len(course.tasks) + 1)
    return Heat(caption, corner, words, course.tasks, course.tasks, cells, numbers, numbers)


def _percent(value: float | None) -> Cell:
    if not is_known(value):
        return Cell()
    level = min(max(int(value * LEVELS / 100), 0), LEVELS - 1)
    return Cell(number(value), f"q{level}")


def _signed(value: float | None, bound: float) -> Cell:
    if not is_known(value):
        return Cell()
    level = round(SIDES * value / bound) if bound else 0
    return Cell(number(value, 2), f"s{level + SIDES}")


def _numbers(course: Course, names: Sequence[str]) -> list[int]:
    """The number of every task; nothing where one is not of this merge."""
    places = {name: place + 1 for place, name in enumerate(course.tasks)}
    return [places[name] for name in names] if set(names) <= places.keys() else []


def _by_block(names: Sequence[str], rows: Sequence[Values]) -> tuple[list[str], list[list[float | None]]]:
    blocks: dict[str, list[Values]] = {}
    for name, row in zip(names, rows, strict=True):
        blocks.setdefault(block_of(name), []).append(row)
    means = []
    for group in blocks.values():
        columns = [[value for value in column if is_known(value)] for column in zip(*group, strict=True)]
        means.append([sum(column) / len(column) if column else None for column in columns])
    return list(blocks), means
