"""``report.html`` without a browser: one document that holds together, and says what the files say."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fabricated_runs import HOSTILE, LAYERS, comparison, merged, table, triangle

from mingle.io.files import CheckpointError
from mingle.runs import explained
from mingle.runs.report import page
from mingle.runs.report.page import advice, cards, charts, heat, render
from mingle.text import shortened, visible

TASKS = ["digits", "letters", "rings", "stripes"]
_VOID = {"meta", "link", "br", "img", "input"}


class Document(HTMLParser):
    """The elements of a page, each with its attributes and the text inside it; opened and closed in pairs."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        element: tuple[str, dict[str, str | None], list[str]] = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, (tag, [name for name, *_ in self.open])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag: str, **attributes: str) -> list[str]:
        """The texts of all elements with these attributes, each of which may be one of several classes."""
        return [
            " ".join("".join(text).split())
            for name, found, text in self.elements
            if name == tag
            and all(value in (found.get(key) or "").split() for key, value in attributes.items())
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparison(tmp_path_factory.mktemp("runs") / "demo", TASKS)


@pytest.fixture(scope="module")
def written(folder: Path) -> Document:
    path = page.write(folder)
    assert path == folder / "report.html"
    return Document(path.read_text(encoding="utf-8"))


def test_it_is_one_document_that_loads_nothing(folder: Path, written: Document) -> None:
    text = page.write(folder).read_text(encoding="utf-8")
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    kept = [
        value for _, found, _ in written.elements for key, value in found.items() if key in ("href", "src")
    ]
    assert kept and all(value is not None and value.startswith(("#", "data:")) for value in kept)
    assert not re.search(r"https?:|@import|url\(|<iframe|<object|<embed", text)
    assert not [key for _, found, _ in written.elements for key in found if key.startswith("on")]


def test_its_policy_allows_its_own_script_alone(written: Document) -> None:
    policy = next(found["content"] or "" for _, found, _ in written.elements if "http-equiv" in found)
    assert "default-src 'none'" in policy and policy.count("script-src") == 1
    script = next("".join(text) for name, _, text in written.elements if name == "script")
    assert f"script-src '{render._digest(script)}'" in policy


def test_headings_go_down_one_level_at_a_time_and_references_lead_somewhere(written: Document) -> None:
    levels = [int(name[1]) for name, *_ in written.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [found["id"] for _, found, _ in written.elements if "id" in found]
    assert len(set(ids)) == len(ids)
    wanted = [found["aria-labelledby"] for _, found, _ in written.elements if "aria-labelledby" in found]
    wanted += [(found["href"] or "")[1:] for name, found, _ in written.elements if name == "a"]
    assert wanted and set(wanted) <= set(ids)


def test_the_table_has_every_figure_and_what_to_sort_it_by(written: Document) -> None:
    heads = written.all("th", scope="col")
    assert heads[:6] == ["method", "ACC %", "task unknown %", "BWT", "seconds", "bytes per task"]
    cells = [
        (found["data-by"], "".join(text)) for name, found, text in written.elements if "data-by" in found
    ]
    average = cells[5:10]
    assert average == [
        ("61", "61.0"), ("41", "41.0"), ("-12", "−12.0"), ("1.25", "1.2"), ("750000", "750 KB"),
    ]  # fmt: skip
    assert (
        "Of 2 merging methods mingle is the most accurate: ACC 91.5 %, BWT −2.0, 30.5 points above average."
        in (written.all("p", **{"class": "lead"}))
    )


def test_cells_of_the_accuracy_matrix_are_told_by_their_row_and_column(folder: Path) -> None:
    course = page.of(folder).groups[0].rows[1].course
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


def test_marks_of_the_chart_name_the_method_and_the_task(folder: Path) -> None:
    drawn = charts.accuracy(page.of(folder).groups[0])
    assert drawn is not None
    marks = {line.name: [mark.text for mark in line.marks] for line in drawn.lines}
    assert marks["average"][2] == "average, after merging rings, task 3 of 4: 64.0 %"
    assert [line.kind for line in drawn.lines] == ["reference", "", "best"]


def test_it_says_where_samples_went_and_which_classes_were_mixed_up(written: Document) -> None:
    assert "Which task’s samples went where" in written.all("h4")
    assert "{value} % of the samples of task {row} were taken for task {column}" in [
        found["data-words"] for _, found, _ in written.elements if "data-words" in found
    ]
    assert "class of rings taken for other 7 of 25" in written.all("li")
    assert "letters 20.0 %" in written.all("dd")


def test_gates_and_curves_are_shown_of_methods_that_adapt(folder: Path, written: Document) -> None:
    course = page.of(folder).groups[0].rows[2].course
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


def test_hostile_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    folder = merged(tmp_path / "merged", HOSTILE)
    text = page.write(folder).read_text(encoding="utf-8")
    found = Document(text)
    assert [name for name, *_ in found.elements].count("script") == 1
    assert [name for name, *_ in found.elements].count("style") == 1
    assert not [key for _, attributes, _ in found.elements for key in attributes if key.startswith("on")]
    assert not found.all("img") and not found.all("b", onerror="")
    heads = found.all("bdi")
    for name in HOSTILE:
        assert " ".join(shortened(name).split()) in heads
        assert " ".join(visible(name).split()) in heads  # as a whole, once
    assert "turned\\u202eround\\u200f" in heads
    assert "\u202e" not in text and "\u200f" not in text
    assert len(text) < 150_000


def test_hostile_names_of_classes_suites_and_methods_are_text_too(tmp_path: Path) -> None:
    folder = comparison(tmp_path, HOSTILE, ("individual", *HOSTILE))
    found = Document(page.write(folder).read_text(encoding="utf-8"))
    assert [name for name, *_ in found.elements].count("script") == 1
    assert "suite [x] <i>, protocol strict" in found.all("h1")
    assert shortened(HOSTILE[0]) in found.all("a")
    assert f"{shortened('class of ' + HOSTILE[0])} taken for other 7 of 25" in found.all("li")


def advised(folder: Path, method: str) -> list[advice.Advice]:
    group = page.of(folder).groups[0]
    row = group.of_method(method)
    assert row is not None
    return advice.of_row(row, group)


def test_what_to_do_next_follows_from_the_numbers(folder: Path) -> None:
    forgotten, short, unknown = advised(folder, "average")
    assert forgotten.findings[0] == (
        "digits lost 18.0 points since it was merged (70.0 → 52.0 %). "
        "Where nobody names the task, 20.0 % of its samples go to stripes."
    )
    assert len(forgotten.findings) == 3 and "stripes lost" not in " ".join(forgotten.findings)
    assert forgotten.try_.startswith("Tasks share these weights.")
    assert short.findings[0].startswith("Already when they are merged, 4 of 4 tasks are answered")
    assert unknown.findings[0].startswith("Where nobody names the task, accuracy is 20.0 points lower.")
    assert "routed" in unknown.try_
    assert [each.findings[0][:31] for each in advised(folder, "mingle")] == [
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


def test_a_merged_model_s_page_has_its_hashes_versions_and_options(tmp_path: Path) -> None:
    (merged(tmp_path, TASKS) / "timings.json").write_text(json.dumps({"seconds": dict.fromkeys(TASKS, 2.5)}))
    found = Document(page.write(tmp_path).read_text(encoding="utf-8"))
    facts = dict(zip(found.all("dt"), found.all("dd"), strict=True))
    assert facts["base, SHA-256"] == "ab" * 32 and facts["base"] == "a/base"
    assert facts["options"] == '{"rank": 64}' and facts["torch"] == "4.5.6" and facts["mingle"] == "1.2.3"
    hashes = found.all("td", **{"class": "hash"})
    assert hashes.count("cd" * 32) == 4 and hashes.count("ab" * 32) == 4
    row = page.of(tmp_path).groups[0].rows[0]
    assert (row.seconds, row.size) == (10.0, 1_500_000)
    assert row.bwt == [pytest.approx(-2.0)] and row.acc == [pytest.approx(91.5)]


def test_several_orders_of_a_merge_are_rows_of_one_page(tmp_path: Path) -> None:
    for seed in (42, 43, 100):
        merged(tmp_path / f"order-{seed}", TASKS)
    labels = [row.label for row in page.of(tmp_path).groups[0].rows]
    assert labels == ["mingle, order-42", "mingle, order-43", "mingle, order-100"]
    assert "base" in dict(page.of(tmp_path).facts)


def test_a_table_s_page_has_published_figures_and_failures(tmp_path: Path) -> None:
    table(
        tmp_path,
        ["s<1>", "s2"],
        ["average", "mingle"],
        TASKS,
        failed={"43": "letters: diverged <b>"},
        devices=["a CPU"],
    )
    found = Document(page.write(tmp_path).read_text(encoding="utf-8"))
    assert "s<1>, protocol strict" in found.all("h2") and "s2, protocol strict" in found.all("h2")
    facts = dict(zip(found.all("dt"), found.all("dd"), strict=False))
    assert (facts["suites"], facts["protocols"], facts["options"]) == ("s<1>, s2", "strict", "k=3")
    assert facts["devices"] == "a CPU"
    assert "published ACC" in found.all("th") and "80.5" in found.all("td")
    assert "1.00 KB" in found.all("td") or "1 KB" in found.all("td")
    assert "order 43: letters: diverged <b>: this order has no result." in found.all("p")


def test_rows_beyond_a_limit_are_in_the_tables_alone(tmp_path: Path) -> None:
    suites = [f"s{place}" for place in range(9)]
    table(tmp_path, suites, ["average", "mingle", "routed"], TASKS[:2])
    found = Document(page.write(tmp_path).read_text(encoding="utf-8"))
    assert len(found.all("article")) == render.MOST_DETAILS == 24
    assert "3 more rows are in the tables alone." in found.all("p")
    assert len(found.all("table", **{"class": "sortable"})) == 9


def explanation(folder: Path, **changes: Any) -> None:
    """An ``explain.json`` of the merge in the folder, as it is now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tasks = [
        {
            "task": name,
            "start": "fine-tuned",
            "before": 95.0,
            "changes": {"rank": -4.0, "newer tasks": 1.0},
            "merged": 92.0,
        }
        for name in TASKS
    ]
    about = {"merge": explained._digest(manifest), "suite": "own <images>", "steps": ["rank"], "tasks": tasks}
    (folder / "explain.json").write_text(json.dumps(about | changes))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"course": {"tasks": {"digits": {"loss": "x"}}}}, r"course\.tasks\.digits\.loss: expected a list"),
        (
            {"course": {"tasks": {"digits": {"loss": [1.0], "strength": {"b": [1.0, 2.0]}}}}},
            r"course\.tasks\.'digits': expected series of one length",
        ),
        (
            {
                "course": {
                    "tasks": {},
                    "gates": {"tasks": ["a"], "experts": ["a"], "layers": [], "mean": [], "own": []},
                }
            },
            r"course\.gates\.mean: expected 1 rows of 1 values",
        ),
    ],
)
def test_a_broken_course_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"manifest\.json: {message}"):
        page.of(merged(tmp_path, TASKS, metadata=change))


def test_other_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run; expected results.json of demo"):
        page.of(tmp_path)
    explanation(merged(tmp_path / "a", TASKS), tasks=[{}])
    with pytest.raises(CheckpointError, match=r"explain\.json: tasks\[0\]\.task is missing"):
        page.of(tmp_path / "a")
    table(tmp_path / "b", ["s"], ["average"], TASKS, folders=["../../a"])
    with pytest.raises(CheckpointError, match="which points outside the folder"):
        page.of(tmp_path / "b")
    result = table(tmp_path / "c", ["s"], ["average"], TASKS) / "cells/0-average/result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"matrix": [[1.0]]}))
    with pytest.raises(CheckpointError, match=r"result\.json: matrix: expected 4 rows"):
        page.of(tmp_path / "c")


def test_a_large_comparison_stays_a_few_hundred_kilobytes(tmp_path: Path) -> None:
    methods = ["individual", "average", "ties", "opcm", "iso-c", "mass", "routed", "mingle", "mingle-light"]
    layers = [f"encoder.layers.{block}.{leaf}" for block in range(12) for leaf in "qkvo12"]
    names = [f"task number {place}" for place in range(20)]
    path = page.write(comparison(tmp_path, names, methods, layers=layers, steps=50))
    found = Document(path.read_text(encoding="utf-8"))
    assert len(found.all("article")) == render.MOST_TASKS // 20 == 8
    assert path.stat().st_size < 600_000


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
