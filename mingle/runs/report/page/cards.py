"""What a page says of each task, and of each row of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mingle.merging.explain import STEPS
from mingle.runs.report.numbers import is_known, mean_of, mean_std, number
from mingle.runs.report.page import charts
from mingle.runs.report.page.advice import LOSS
from mingle.runs.report.page.model import Course, Group, Row, Values
from mingle.text import shortened

#: how many other tasks are named for the samples that went astray
_MOST_OTHERS = 3
_UNITS = ("bytes", "KB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Figure:
    """A cell of a table that sorts.

    Attributes:
        shown: the text.
        sorted_by: the number that it sorts by; empty where there is none.
    """

    shown: str
    sorted_by: str = ""


@dataclass(frozen=True)
class Card:
    """A task.

    Attributes:
        number, name: from 1, in order of arrival.
        now: the accuracy after the last merge.
        change: since it was merged, with a sign; empty where it is not known, or the task is the last.
        bad: whether that is worth a warning.
        line: of its accuracy after every merge, as a path; empty where there are fewer than two.
        facts: names and values.
        confused: classes mixed up: the right one, the answer, and how often.
        notes: things worth telling.
    """

    number: int
    name: str
    now: str
    change: str
    bad: bool
    line: str
    facts: Sequence[tuple[str, str]]
    confused: Sequence[tuple[str, str, str]]
    notes: Sequence[str]


@dataclass(frozen=True)
class Explained:
    """The table of `mingle explain`.

    Attributes:
        columns: heads after the first.
        steps: names, and what they do.
        rows: the task, and its figures.
        suite: of the samples.
    """

    columns: Sequence[str]
    steps: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[str]]]
    suite: str


def columns(group: Group) -> list[tuple[str, str]]:
    """The columns after the first of a group's table, by what there is: heads, and what they mean."""
    rows = group.rows
    told = [
        ("ACC %", "mean accuracy over all tasks after the last merge", True),
        ("published ACC", "the paper's", any("acc" in row.published for row in rows)),
        (
            "task unknown %",
            "the same where nobody names the task: task and class are both right",
            _any(rows, "unknown"),
        ),
        ("BWT", "backward transfer: points that earlier tasks gained or lost since they were merged", True),
        ("published BWT", "the paper's", any("bwt" in row.published for row in rows)),
        ("seconds", "of merging", any(row.seconds is not None for row in rows)),
        (
            "bytes per task",
            "kept beside the base, over the number of tasks",
            any(row.size is not None for row in rows),
        ),
    ]
    return [(head, meaning) for head, meaning, there in told if there]


def figures(row: Row, group: Group) -> list[Figure]:
    """The cells of a row, in those columns."""
    every = {
        "ACC %": _spread(row.acc),
        "published ACC": _plain(row.published.get("acc")),
        "task unknown %": _spread(row.unknown),
        "BWT": _spread(row.bwt),
        "published BWT": _plain(row.published.get("bwt")),
        "seconds": _plain(row.seconds),
        "bytes per task": Figure(readable(row.size), "" if row.size is None else f"{row.size:.0f}"),
    }
    return [every[head] for head, _ in columns(group)]


def cards(row: Row, group: Group) -> list[Card]:
    """The tasks of a row, in order of arrival."""
    course = row.course
    return [] if course is None else [_card(course, place, group) for place in range(len(course.tasks))]


def explained(course: Course) -> Explained | None:
    """What `mingle explain` found; None where it was not run, or on another merge."""
    tasks: list[Mapping[str, Any]] = course.explained.get("tasks", [])
    if not tasks:
        return None
    steps = [step for step in STEPS if any(step in task["changes"] for task in tasks)]
    rows = []
    for task in tasks:
        changes = [_signed(task["changes"].get(step)) if step in task["changes"] else "" for step in steps]
        rows.append((shortened(task["task"]), [number(task["before"]), *changes, number(task["merged"])]))
    if len(tasks) > 1:
        means = [_signed(mean_of([task["changes"].get(step, 0.0) for task in tasks])) for step in steps]
        ends = [number(mean_of([task[key] for task in tasks])) for key in ("before", "merged")]
        rows.append(("mean", [ends[0], *means, ends[1]]))
    starts = " or ".join(dict.fromkeys(shortened(task["start"]) for task in tasks))
    return Explained(
        [starts, *steps, "merged"],
        [(step, STEPS[step]) for step in steps],
        rows,
        shortened(course.explained.get("suite") or ""),
    )


def summary(group: Group) -> str:
    """A sentence on the group."""
    best = group.best()
    if best is None:
        return "" if any(row.course for row in group.rows) else "No merge has a result yet."
    acc, rivals = mean_of(best.acc), [row for row in group.rows if row is not best and not row.reference]
    told = f"ACC {number(acc)} %, BWT {number(mean_of(best.bwt))}"
    name = shortened(best.label)
    others = [(mean_of(row.acc), row) for row in rivals if is_known(mean_of(row.acc))]
    if not others:
        return f"{name}: {told}."
    second, row = max(others, key=lambda pair: pair[0])
    text = f"Of {len(others) + 1} merging methods {name} is the most accurate: {told},"
    return f"{text} {number(acc - second)} points above {shortened(row.label)}."


def _card(course: Course, place: int, group: Group) -> Card:
    name, count = course.tasks[place], len(course.tasks)
    lost = course.lost(place) if place < count - 1 else None
    after = [course.accuracy(step, place) for step in range(place, count)]
    facts = (
        [("when merged", f"{number(course.accuracy(place, place))} %")]
        if course.accuracy(place, place) is not None
        else []
    )
    if (alone := _alone(group, name)) is not None:
        facts.append(("its own model", f"{number(alone)} %"))
    if (found := course.found(place)) is not None:
        facts.append(("task unknown", f"{number(found)} %"))
    shares = course.taken(place)
    others = sorted(
        (other for other in shares if other != name and shares[other] >= 0.05), key=lambda o: -shares[o]
    )
    if others:
        named = ", ".join(f"{shortened(other)} {number(shares[other])} %" for other in others[:_MOST_OTHERS])
        facts.append(("taken for", named))
    if (cost := _worst_step(course, name)) is not None:
        facts.append(("costliest step", cost))
    confused = [
        (shortened(each["wanted"]), shortened(each["given"]), f"{each['count']} of {each['samples']}")
        for each in course.answers.get(name, {}).get("confused", ())
    ]
    return Card(
        number=place + 1,
        name=shortened(name),
        now=number(course.now(place)),
        change="" if lost is None else _signed(-lost),
        bad=lost is not None and lost > LOSS,
        line=charts.small(after) if sum(map(is_known, after)) > 1 else "",
        facts=facts,
        confused=confused,
        notes=[shortened(note, 300) for note in course.notes.get(name, ())],
    )


def _alone(group: Group, name: str) -> float | None:
    row = group.of_method("individual")
    if row is None or row.course is None or name not in row.course.tasks:
        return None
    return row.course.now(list(row.course.tasks).index(name))


def _worst_step(course: Course, name: str) -> str | None:
    for task in course.explained.get("tasks", ()):
        known = {step: value for step, value in task["changes"].items() if is_known(value)}
        step = min(known, key=lambda each: known[each], default=None)
        if task["task"] == name and step is not None and known[step] < 0:
            return f"{shortened(step)} {_signed(known[step])}"
    return None


def _any(rows: Sequence[Row], key: str) -> bool:
    return any(is_known(value) for row in rows for value in getattr(row, key))


def _signed(value: float | None) -> str:
    text = number(value)
    return f"+{text}" if is_known(value) and round(value, 1) > 0 else text


def _spread(values: Values) -> Figure:
    mean = mean_of(values)
    return Figure(mean_std(values), f"{mean:.6g}" if is_known(mean) else "")


def _plain(value: float | None) -> Figure:
    return Figure(number(value), f"{value:.6g}" if is_known(value) else "")


def readable(value: float | None) -> str:
    """A size in bytes as people read it."""
    if value is None:
        return "–"
    size, unit = value, 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if unit else f"{size:.0f} bytes"
