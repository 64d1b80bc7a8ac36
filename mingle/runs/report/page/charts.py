"""Where the lines, marks and labels of a chart are, as numbers for a template that draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mingle.runs.report.canvas import spread
from mingle.runs.report.numbers import is_known, mean_of, number
from mingle.runs.report.page.model import Course, Group, Values
from mingle.text import shortened

#: the sizes of all charts, in units that are pixels where a chart has its full width
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 300, 44, 14, 34
#: the room right of an accuracy chart for the names of methods, their length, and the height of a line
_NAMES, _NAME_LENGTH, _LINE = 178, 20, 15
#: the most lines of layers in a chart, and the most points in all of them
_MOST_LINES, _MOST_POINTS = 48, 2400


@dataclass(frozen=True)
class Mark:
    """A point with a text that says what it is."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """A line, and its marks.

    Attributes:
        name: what it is called.
        kind: ``reference``, ``best``, ``mean`` or nothing.
        path: as SVG has it.
        marks: its points, where they say something.
        place: where its name stands, in height; None where there is no name.
        value: the last one, as text.
        depth: from 0 to 1, of a block of layers.
    """

    name: str
    kind: str
    path: str
    marks: Sequence[Mark] = ()
    place: float | None = None
    value: str = ""
    depth: float = 0.0


@dataclass(frozen=True)
class Span:
    """A part of the horizontal axis, and what it is."""

    x: float
    width: float
    name: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: what it shows, for those who cannot see it.
        right: where the axes end.
        ticks: of the vertical axis: height and text.
        steps: of the horizontal axis: place and text.
        lines: from back to front.
        spans: parts of the horizontal axis.
        across: the name of the horizontal axis.
    """

    title: str
    right: float
    ticks: Sequence[tuple[float, str]]
    steps: Sequence[tuple[float, str]]
    lines: Sequence[Line]
    spans: Sequence[Span] = field(default=())
    across: str = ""


def accuracy(group: Group) -> Chart | None:
    """Mean accuracy over the tasks so far, of every row; None where nothing is known of two merges."""
    curves: dict[int, list[float | None]] = {}
    for place, row in enumerate(group.rows):
        length = min((len(each) for each in row.curves), default=0)
        means = [mean_of([each[i] for each in row.curves]) for i in range(length)]
        if sum(map(is_known, means)) > 1 or (length == 1 and is_known(means[0])):
            curves[place] = [value if is_known(value) else None for value in means]
    count = max(map(len, curves.values()), default=0)
    if count < 2:
        return None
    known = [value for values in curves.values() for value in values if is_known(value)]
    low, high, step = _round_range(min(known), max(known))
    right, best = WIDTH - _NAMES, group.best()

    def across(i: int) -> float:
        return LEFT + (right - LEFT) * (i + 0.5) / count

    def up(value: float) -> float:
        return _up(value, low, high)

    lasts = {
        place: max(i for i, value in enumerate(values) if value is not None)
        for place, values in curves.items()
    }
    ends = {place: values[lasts[place]] or 0.0 for place, values in curves.items()}
    heights = spread(
        [up(end) for end in ends.values()], _LINE, TOP, max(HEIGHT - BOTTOM, TOP + _LINE * len(ends))
    )
    lines = []
    for (place, values), height in zip(curves.items(), heights, strict=True):
        row = group.rows[place]
        points = [(across(i), up(value)) if value is not None else None for i, value in enumerate(values)]
        marks = [
            Mark(
                *point,
                f"{shortened(row.label)}, {_arrived(row.course, i, len(row.curves))}: {number(values[i])} %",
            )
            for i, point in enumerate(points)
            if point is not None
        ]
        kind = "reference" if row.reference else "best" if row is best else ""
        name, value = shortened(row.label, _NAME_LENGTH), number(ends[place])
        lines.append(Line(name, kind, _path(points), marks, round(float(height), 1), value))
    ticks = [(up(low + i * step), f"{low + i * step:g}") for i in range(round((high - low) / step) + 1)]
    every = math.ceil(count / 20)
    steps = [(across(i), str(i + 1)) for i in range(0, count, every)]
    title = f"Mean accuracy over the tasks merged so far: {', '.join(line.name for line in lines)}"
    return Chart(title, right, ticks, steps, lines, across="merged tasks")


def _arrived(course: Course | None, step: int, orders: int) -> str:
    """When a value was measured, in words."""
    if course is None or step >= len(course.tasks):
        return f"after {step + 1} tasks"
    task, count = shortened(course.tasks[step]), len(course.tasks)
    if orders > 1:
        first = f"the first order has merged {task}"
        return f"after {step + 1} of {count} tasks, the mean of {orders} orders; {first}"
    return f"after merging {task}, task {step + 1} of {count}"


def interference(course: Course) -> Chart | None:
    """S of every block of layers, and its mean, over the adaptation of all tasks that had a basis."""
    return _learned(course, "interference", "Interference S")


def strength(course: Course) -> Chart | None:
    """λ, in the same way."""
    return _learned(course, "strength", "Projection strength λ")


def _learned(course: Course, key: str, what: str) -> Chart | None:
    noted: Mapping[str, Any] = course.learned.get("tasks", {})
    tasks = [name for name in course.tasks if noted.get(name, {}).get(key)]
    blocks = list(dict.fromkeys(block for name in tasks for block in noted[name][key]))
    if not blocks:
        return None
    shown = blocks if len(blocks) <= _MOST_LINES else []
    values = [
        value for name in tasks for series in noted[name][key].values() for value in series if is_known(value)
    ]
    if not values:
        return None
    logarithmic = key == "interference" and max(values) > 0
    ticks, up = _logarithmic(values) if logarithmic else _linear(values)
    width = (WIDTH - 12 - LEFT) / len(tasks)
    longest = max(len(series) for name in tasks for series in noted[name][key].values())
    few = max(2, _MOST_POINTS // max(1, (len(shown) + 1) * len(tasks)))
    lines = []
    for place, block in enumerate(shown):
        path = " ".join(
            _path(_along(noted[name][key].get(block, ()), LEFT + i * width, width, up, few))
            for i, name in enumerate(tasks)
        )
        lines.append(Line(shortened(block), "", path, depth=place / max(len(shown) - 1, 1)))
    means = [_means(list(noted[name][key].values()), longest) for name in tasks]
    path = " ".join(_path(_along(series, LEFT + i * width, width, up, few)) for i, series in enumerate(means))
    lines.append(Line("mean over layers", "mean", path))
    spans = [
        Span(
            round(LEFT + i * width, 1),
            round(width, 1),
            str(course.tasks.index(name) + 1),
            _told(name, what, series),
        )
        for i, (name, series) in enumerate(zip(tasks, means, strict=True))
    ]
    title = f"{what} while each task was merged"
    return Chart(title, WIDTH - 12, ticks, (), lines, spans, "the steps of each task, by its number")


def _told(name: str, what: str, series: Values) -> str:
    known = [value for value in series if is_known(value)]
    if not known:
        return f"merging {shortened(name)}: nothing is known of it"
    ends = f"from {known[0]:.3g} at the first step to {known[-1]:.3g} at the last"
    return f"merging {shortened(name)}: {what[0].lower()}{what[1:]} {ends}, at most {max(known):.3g}"


def _means(series: Sequence[Values], longest: int) -> list[float | None]:
    """Step by step, over series of up to that length."""
    means: list[float | None] = []
    for step in range(longest):
        known = [each[step] for each in series if step < len(each)]
        numbers = [value for value in known if is_known(value)]
        means.append(sum(numbers) / len(numbers) if numbers else None)
    return means


def _along(series: Values, left: float, width: float, up: Any, few: int) -> list[tuple[float, float] | None]:
    """Points side by side within a span, at most `few`."""
    last, count = len(series) - 1, min(len(series), few)
    places = [round(i * last / max(count - 1, 1)) for i in range(count)]
    points: list[tuple[float, float] | None] = []
    for place in places:
        value = series[place]
        x = left + width * (0.04 + 0.92 * (place / last if last else 0.5))
        points.append((x, up(value)) if is_known(value) else None)
    return points


def _logarithmic(values: Sequence[float]) -> tuple[list[tuple[float, str]], Any]:
    """Ticks at powers of ten, and the height of a value; what is 0 or less stands at the bottom."""
    top = max(values)
    positive = [value for value in values if value > top * 1e-4]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(top))
    high = max(high, low + 1)

    def up(value: float) -> float:
        return _up(max(math.log10(value), low) if value > 0 else low, low, high)

    return [(_up(power, low, high), f"{10.0**power:g}") for power in range(low, high + 1)], up


def _linear(values: Sequence[float]) -> tuple[list[tuple[float, str]], Any]:
    low, high, step = _round_range(min(values), max(values))

    def up(value: float) -> float:
        return _up(value, low, high)

    return [(up(low + i * step), f"{low + i * step:.6g}") for i in range(round((high - low) / step) + 1)], up


def _up(value: float, low: float, high: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low), 1)


def _round_range(low: float, high: float) -> tuple[float, float, float]:
    """A range around values that ends at round numbers, and the distance of about five ticks in it."""
    rough = max(high - low, 1e-9 + abs(high) * 1e-3) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= rough * 0.999)
    first = math.floor(low / step + 1e-9) * step
    last = max(math.ceil(high / step - 1e-9) * step, first + step)
    return first, last, step


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """Points joined by lines, as SVG has it; None breaks the line."""
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{point[0]:.4g} {point[1]:.4g}")
        pen = "L"
    return "".join(parts)


def small(values: Values, width: float = 120, height: float = 28) -> str:
    """The path of a line without axes, of accuracies in per cent."""
    points: list[tuple[float, float] | None] = []
    for i, value in enumerate(values):
        x = 2 + (width - 4) * (i / max(len(values) - 1, 1))
        points.append((x, 2 + (height - 4) * (1 - value / 100)) if is_known(value) else None)
    return _path(points)
