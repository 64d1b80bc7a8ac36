"""What ``report.html`` says is to be done next: it follows from the numbers and the method."""

from __future__ import annotations

from pathlib import Path

import pytest
from fabricated_runs import TASKS, explanation, merged, triangle
from html_document import Document

from mingle.runs.report import page
from mingle.runs.report.page import advice


def advised(folder: Path, method: str) -> list[advice.Advice]:
    group = page.of(folder).groups[0]
    row = group.of_method(method)
    assert row is not None
    return advice.of_row(row, group)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("mingle", "mingle-routed, whose router"),
        ("mingle-routed", "more seed samples"),
        ("routed", "more seed samples"),
        ("mass", "Try routed"),
        ("wemoe", "Try routed"),
        ("average", "Tasks share these weights"),
        ("no method of ours", "Try routed or mingle-routed."),
    ],
)
def test_what_is_tried_against_forgetting_depends_on_the_method(method: str, words: str) -> None:
    assert words in advice._against_forgetting(method)


def test_what_to_do_next_follows_from_the_numbers(compared: Path) -> None:
    forgotten, short, unknown = advised(compared, "average")
    assert forgotten.findings[0] == (
        "digits lost 18.0 points since it was merged (70.0 → 52.0 %). "
        "Where nobody names the task, 20.0 % of its samples go to stripes."
    )
    assert len(forgotten.findings) == 3 and "stripes lost" not in " ".join(forgotten.findings)
    assert forgotten.try_.startswith("Tasks share these weights.")
    assert short.findings[0].startswith("Already when they are merged, 4 of 4 tasks are answered")
    assert unknown.findings[0].startswith("Where nobody names the task, accuracy is 20.0 points lower.")
    assert "routed" in unknown.try_
    assert [each.findings[0][:31] for each in advised(compared, "mingle")] == [
        "Where nobody names the task, ac"
    ]


@pytest.mark.parametrize(("drop", "lines"), [(1.0, 0), (1.01, 1)])
def test_three_points_may_be_lost_without_a_line(tmp_path: Path, drop: float, lines: int) -> None:
    matrix = [row[: i + 1] for i, row in enumerate(triangle(4, 90.0, drop))]
    folder = merged(tmp_path, TASKS, matrix=matrix)
    (only,) = advised(folder, "mingle")
    if lines:
        assert only.findings[0].startswith("digits lost 3.0 points")
        assert "mingle-routed" in only.try_
    else:
        assert only.findings == ["No task lost more than 3 points since it was merged (at most 3.0)."]
        assert only.command == f"mingle add {folder} --name TASK --model MODEL"


def test_it_is_said_when_a_task_lost_most(tmp_path: Path) -> None:
    matrix = [[90.0], [89.0, 90.0], [82.0, 90.0, 90.0], [81.0, 90.0, 90.0, 90.0]]
    (only,) = advised(merged(tmp_path, TASKS, matrix=matrix), "mingle")
    assert only.findings == [
        "digits lost 9.0 points since it was merged (90.0 → 81.0 %), 7.0 of them when rings came."
    ]


def test_a_merge_that_was_not_measured_is_told_how(tmp_path: Path) -> None:
    matrix: list[list[None]] = [[None] * (i + 1) for i in range(4)]
    (only,) = advised(merged(tmp_path, TASKS, "average", matrix=matrix), "average")
    assert only.findings == ["Accuracy was not measured: the merge has no suite."]
    assert only.command == f"mingle eval {tmp_path} --suite FOLDER_OR_NAME"
    Document(page.write(tmp_path).read_text(encoding="utf-8"))


def test_what_explain_found_is_shown_until_another_task_is_merged(tmp_path: Path) -> None:
    folder = merged(tmp_path, TASKS)
    explanation(folder)
    found = Document(page.write(folder).read_text(encoding="utf-8"))
    assert "What each step of merging costs" in found.all("h4")
    assert any("on own <images>" in text for text in found.all("caption"))
    assert "rank −4.0" in found.all("dd")
    assert any(each.try_ == "Try a larger rank." for each in advised(folder, "mingle"))
    merged(folder, [*TASKS, "waves"])
    assert "What each step of merging costs" not in page.write(folder).read_text(encoding="utf-8")
