"""Charts, cells of colour and sizes on ``report.html``: what they show, and that one can read them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from fabricated_runs import LAYERS, TASKS, comparison
from html_document import Document

from mingle.runs.report import page
from mingle.runs.report.page import cards, charts, heat, render


def test_cells_of_the_accuracy_matrix_are_told_by_their_row_and_column(compared: Path) -> None:
    course = page.of(compared).groups[0].rows[1].course
    assert course is not None
    found = heat.accuracies(course)
    assert found is not None
    assert found.words == "accuracy on task {column} after merging task {row}: {value} %"
    shown = [[cell.shown for cell in row] for row in found.cells]
    assert shown == [
        ["70.0", "", "", ""],
        ["64.0", "70.0", "", ""],
        ["58.0", "64.0", "70.0", ""],
        ["52.0", "58.0", "64.0", "70.0"],
    ]
    assert found.cells[0][0].level == "q7" and found.cells[3][0].level == "q5"
    assert heat._percent(100.0).level == "q9" and heat._percent(0.0).level == "q0"


def test_marks_of_the_chart_name_the_method_and_the_task(compared: Path) -> None:
    drawn = charts.accuracy(page.of(compared).groups[0])
    assert drawn is not None
    marks = {line.name: [mark.text for mark in line.marks] for line in drawn.lines}
    assert marks["average"][2] == "average, after merging rings, task 3 of 4: 64.0 %"
    assert [line.kind for line in drawn.lines] == ["reference", "", "best"]


def test_names_beside_the_chart_keep_apart_however_many_there_are(tmp_path: Path) -> None:
    methods = ["individual", *(f"method {place}" for place in range(30))]
    drawn = charts.accuracy(page.of(comparison(tmp_path, TASKS, methods)).groups[0])
    assert drawn is not None
    heights = sorted(line.place for line in drawn.lines if line.place is not None)
    assert len(heights) == 31 and heights[0] > 0 and heights[-1] < drawn.tall
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 14.9


def test_gates_and_curves_are_shown_of_methods_that_adapt(compared: Path, written: Document) -> None:
    course = page.of(compared).groups[0].rows[2].course
    assert course is not None
    mean, own = heat.gates(course), heat.own_gates(course)
    assert mean is not None and own is not None
    assert [cell.shown for cell in mean.cells[1]] == ["−0.25", "1.00", "−0.25", "−0.25"]
    assert list(own.rows) == LAYERS and {cell.shown for row in own.cells for cell in row} == {"1.25"}
    assert mean.cells[1][1].level == "s8" and mean.cells[1][0].level == "s3"
    assert written.all("h4").count("Interference with earlier tasks") == 1
    told = [found["aria-label"] for name, found, _ in written.elements if name == "rect"]
    assert (
        "merging letters: interference S from 0.001 at the first step to 0.032 at the last, at most 0.032"
        in told
    )
    assert len(told) == 6  # S and λ of the three tasks that had a basis


def test_layers_that_are_too_many_are_shown_by_block(tmp_path: Path) -> None:
    layers = [f"encoder.layers.{block}.{leaf}" for block in range(48) for leaf in "abcdefghij"]
    course = page.of(comparison(tmp_path, TASKS, layers=layers, steps=2)).groups[0].rows[2].course
    assert course is not None and (own := heat.own_gates(course)) is not None
    assert len(own.rows) == 48 and "means over the layers of a block" in own.caption
    assert own.cells[0][0].shown == "1.25"


def colours(css: str, dark: bool) -> dict[str, tuple[str, str]]:
    """Class of a cell → its background and text; ``--name`` → the colour and itself."""
    pair = r"light-dark\((#\w{6}), (#\w{6})\)"
    found = {}
    for name, *values in re.findall(rf"\.([qs]\d) {{ background: {pair}; color: {pair}; }}", css):
        found[name] = (values[dark], values[2 + dark])
    for name, *values in re.findall(rf"(--[\w-]+): {pair}", css):
        found[name] = (values[dark], values[dark])
    return found


def contrast(one: str, other: str) -> float:
    """Of two colours, by WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground_in_both_themes(dark: bool) -> None:
    found = colours(render._text("style.css"), dark)
    cells = {name: pair for name, pair in found.items() if not name.startswith("--")}
    assert len(cells) == heat.LEVELS + 2 * heat.SIDES + 1
    assert {name: round(contrast(*pair), 1) for name, pair in cells.items() if contrast(*pair) < 4.5} == {}
    for ground in ("--ground", "--raised"):
        for ink in ("--text", "--soft", "--accent", "--bad"):
            assert contrast(found[ground][0], found[ink][0]) >= 4.5, (ground, ink)


def test_sizes_are_readable() -> None:
    shown = {0: "0 bytes", 999: "999 bytes", 1_000: "1 KB", 999_600: "1 MB", 2_345_678: "2.35 MB"}
    assert {size: cards.readable(size) for size in shown} == shown
    assert cards.readable(None) == "–"
