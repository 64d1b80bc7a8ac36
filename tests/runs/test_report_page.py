"""``report.html`` without a browser: one document that holds together, and says what the files say."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fabricated_runs import HOSTILE, TASKS, comparison, explanation, merged, table
from html_document import Document

from mingle.io.files import CheckpointError
from mingle.runs.report import page
from mingle.runs.report.page import render
from mingle.text import shortened, visible


def test_it_is_one_document_that_loads_nothing(compared: Path, written: Document) -> None:
    text = page.write(compared).read_text(encoding="utf-8")
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


def test_it_says_where_samples_went_and_which_classes_were_mixed_up(written: Document) -> None:
    assert "Which task’s samples went where" in written.all("h4")
    assert "{value} % of the samples of task {row} were taken for task {column}" in [
        found["data-words"] for _, found, _ in written.elements if "data-words" in found
    ]
    assert "class of rings taken for other 7 of 25" in written.all("li")
    assert "letters 20.0 %" in written.all("dd")


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
