"""What to do next, as far as the numbers of a merge say: every line has its reason in it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mingle.merging.explain import STEPS
from mingle.methods import METHODS
from mingle.methods.gated import GatedMethod
from mingle.runs.report.numbers import is_known, mean_of, number
from mingle.runs.report.page.model import Course, Group, Row
from mingle.text import shortened

#: points of accuracy that are worth a line, and points that finding the task may cost without one
LOSS, GAP = 3.0, 10.0
#: the share of a task's samples, in per cent, from which on it is said where they went
_MISTAKEN = 2.0
#: how many tasks are named for one reason
_MOST = 3
_OWN_GATES = ("mingle", "mingle-light", "mingle-seq", "wemoe")


@dataclass(frozen=True)
class Advice:
    """A finding, and what to try.

    Attributes:
        findings: sentences with the numbers.
        try_: a sentence; empty where there is nothing to try.
        command: of mingle, to copy; empty where there is none.
    """

    findings: list[str]
    try_: str = ""
    command: str = ""


def of_row(row: Row, group: Group) -> list[Advice]:
    """What the numbers of one row ask for; where they ask for nothing, a line that says so."""
    found = [Advice([f"{reason}: this order has no result."]) for reason in row.failed]
    course = row.course
    if course is None:
        return found
    if not course.tasks:
        return [*found, Advice(["No task is merged yet."], "Add the first.", _adding(course))]
    for task, reason in course.skipped.items():
        found.append(
            Advice([f"Nothing of {shortened(task)} was merged: {shortened(reason, 300).rstrip('.')}."])
        )
    if all(course.now(task) is None for task in range(len(course.tasks))):
        text = "Accuracy was not measured: the merge has no suite."
        command = f"mingle eval {shlex.quote(course.folder)} --suite FOLDER_OR_NAME" if course.folder else ""
        return [*found, Advice([text], "Measure it on a suite, or on a folder of your own images.", command)]
    reasons = [
        *_forgotten(row, course),
        *_short(row, course, group),
        *_explained(row, course),
        *_unknown(row, course),
    ]
    if not reasons and not row.reference:
        worst = [lost for task in range(len(course.tasks)) if (lost := course.lost(task)) is not None]
        told = f"No task lost more than {LOSS:g} points since it was merged"
        told += f" (at most {number(max(worst))})." if worst and max(worst) > 0 else "."
        reasons = [Advice([told], "The next one can come." if course.folder else "", _adding(course))]
    return found + reasons


def _adding(course: Course) -> str:
    return (
        "" if course.folder is None else f"mingle add {shlex.quote(course.folder)} --name TASK --model MODEL"
    )


def _forgotten(row: Row, course: Course) -> Iterator[Advice]:
    """Tasks that lost much since they were merged: when, and to whom."""
    lost = {task: value for task in range(len(course.tasks)) if (value := course.lost(task)) is not None}
    worst = sorted((task for task in lost if lost[task] > LOSS), key=lambda task: -lost[task])
    lines = []
    for task in worst[:_MOST]:
        then, now = course.accuracy(task, task), course.now(task)
        text = f"{shortened(course.tasks[task])} lost {number(lost[task])} points since it was merged"
        text += f" ({number(then)} → {number(now)} %)"
        if (drop := _greatest_drop(course, task)) is not None:
            step, points = drop
            text += f", {number(points)} of them when {shortened(course.tasks[step])} came"
        lines.append(f"{text}.{_mistaken(course, task)}")
    if len(worst) > _MOST:
        lines.append(f"{len(worst) - _MOST} more lost over {LOSS:g} points.")
    if lines:
        yield Advice(lines, _against_forgetting(row.method))


def _against_forgetting(method: str) -> str:
    chosen = METHODS.get(method)
    if method in _OWN_GATES:
        return (
            "Try mingle-routed, whose router keeps other tasks’ experts quiet; or protect more directions "
            "(a larger k), or remember interference longer (beta nearer to 1)."
        )
    if chosen is not None and (chosen.routes or issubclass(chosen, GatedMethod)):
        if chosen.needs_seeds:
            return "Try more seed samples per class: they are what the router knows of a task."
        return "Try routed, whose router learns from seed samples."
    return (
        "Tasks share these weights. Try a method that keeps an expert for each: routed or mingle-routed with "
        "seed samples, mass without."
    )


def _greatest_drop(course: Course, task: int) -> tuple[int, float] | None:
    """The arrival that cost a task half of its loss or more, and how much; None where none did."""
    steps = range(task + 1, len(course.tasks))
    drops = []
    for step in steps:
        before, after = course.accuracy(step - 1, task), course.accuracy(step, task)
        if before is None or after is None:
            return None
        drops.append((before - after, step))
    points, step = max(drops, default=(0.0, 0))
    lost = course.lost(task) or 0.0
    return (step, points) if len(drops) > 1 and points >= lost / 2 else None


def _mistaken(course: Course, task: int) -> str:
    """To which other task most of its samples went, as a sentence."""
    shares = course.taken(task)
    shares.pop(course.tasks[task], None)
    other = max(shares, key=lambda name: shares[name], default=None)
    if other is None or shares[other] < _MISTAKEN:
        return ""
    return f" Where nobody names the task, {number(shares[other])} % of its samples go to {shortened(other)}."


def _short(row: Row, course: Course, group: Group) -> Iterator[Advice]:
    """Tasks that were already below their own models when they were merged."""
    individual = group.of_method("individual")
    if row.reference or individual is None or individual.course is None:
        return
    alone = individual.course
    own = {name: alone.now(place) for place, name in enumerate(alone.tasks)}
    gaps = {}
    for task, name in enumerate(course.tasks):
        then, best = course.accuracy(task, task), own.get(name)
        if then is not None and best is not None and best - then > LOSS:
            gaps[name] = best - then
    if not gaps:
        return
    worst = sorted(gaps, key=lambda name: -gaps[name])
    named = ", ".join(f"{shortened(name)} by {number(gaps[name])}" for name in worst[:_MOST])
    text = (
        f"Already when they are merged, {len(gaps)} of {len(course.tasks)} tasks are answered over {LOSS:g}"
    )
    text += f" points less well than by their own models, most of all {named}."
    if course.explained or course.folder is None:
        yield Advice([text])
    else:
        yield Advice(
            [text],
            "mingle explain says which step of merging costs them:",
            f"mingle explain {shlex.quote(course.folder)}",
        )


_REMEDIES = {
    "other tensors": (
        "Biases, norms and embeddings stay the base’s: try more layers, or a method that merges all tensors."
    ),
    "rank": "Try a larger rank.",
    "projection": "Older experts span the layers: try a smaller rank, or routed, which takes nothing out.",
    "own gate": "Try more steps, or more seed samples per class.",
    "routing": "Try more seed samples per class: they are what the router knows of a task.",
}


def _explained(row: Row, course: Course) -> Iterator[Advice]:
    """The step that costs most on average, where `mingle explain` has measured them."""
    tasks: list[Mapping[str, Any]] = course.explained.get("tasks", [])
    used = [step for step in STEPS if any(step in task["changes"] for task in tasks)]
    means = {step: mean_of([task["changes"].get(step, 0.0) for task in tasks]) for step in used}
    means = {step: mean for step, mean in means.items() if is_known(mean)}
    step = min(means, key=lambda name: means[name], default=None)
    if step is not None and means[step] < -LOSS:
        text = f"By mingle explain the step “{step}” costs most: {number(-means[step])} points per task"
        yield Advice([f"{text} ({STEPS[step]})."], _REMEDIES.get(step, _against_forgetting(row.method)))


def _unknown(row: Row, course: Course) -> Iterator[Advice]:
    """How much it costs that nobody names the task, where that is much."""
    known, unknown = mean_of(row.acc), mean_of(row.unknown)
    if row.reference or not (is_known(known) and is_known(unknown)) or known - unknown <= GAP:
        return
    pairs = [
        (share, name, other)
        for task, name in enumerate(course.tasks)
        for other, share in course.taken(task).items()
        if other != name
    ]
    text = f"Where nobody names the task, accuracy is {number(known - unknown)} points lower."
    if pairs:
        share, name, other = max(pairs)
        text += f" Worst off is {shortened(name)}: {number(share)} % of its samples go to {shortened(other)}."
    chosen = METHODS.get(row.method)
    if chosen is not None and chosen.routes:
        yield Advice(
            [text], "Name the task where you know it, or give the router more seed samples per class."
        )
    else:
        yield Advice(
            [text],
            "Name the task where you know it, or take a method that finds it: routed or mingle-routed.",
        )
