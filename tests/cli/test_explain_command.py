"""``mingle explain``: a table, the same numbers as JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

import mingle
from mingle import suites
from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.runs.origin import origin
from mingle.suites import Suite
from mingle.suites.glyphs import BASE, expert_folder, tasks

NAMES = ("greek-inverted", "hebrew-inverted")
SETTINGS = {"average": {}, "routed": {"rank": 4, "depths": (0,)}}


@pytest.fixture(scope="module", params=SETTINGS)
def folder(request, tmp_path_factory, few_images):
    suite = suites.load("glyphs4", samples_per_class=1)
    merger = mingle.Merger(BASE, request.param, **SETTINGS[request.param])
    merger.metadata = origin("glyphs4", samples_per_class=1)
    for name in NAMES:
        merger.add(name, suite.expert(name), suite.seeds(name))
    folder = tmp_path_factory.mktemp("merged") / request.param
    merger.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    whole = Suite.__getitem__
    monkeypatch.setattr(Suite, "__getitem__", lambda self, name: whole(self, name).select(torch.arange(40)))


def test_the_table_and_the_file_say_the_same(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "explanation.json"
    assert main(["explain", str(folder), "--out", str(out)]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    steps = {"average": ["other tensors", "all tasks"], "routed": ["other tensors", "rank", "routing"]}
    assert [each["task"] for each in found["tasks"]] == list(NAMES)
    rows = [line.split() for line in text.splitlines()]
    for each in found["tasks"]:
        changes = each["changes"]
        assert sorted(changes) == sorted(steps[folder.name])
        assert each["before"] + sum(changes.values()) == pytest.approx(each["merged"])
        told = [f"{changes[step]:+.1f}" for step in steps[folder.name]]
        assert [each["task"], f"{each['before']:.1f}", *told, f"{each['merged']:.1f}"] in rows
    assert any(row[:1] == ["mean"] for row in rows)
    assert all(f"{step}: " in text for step in steps[folder.name])
    kept = json.loads((folder / "explain.json").read_text())
    assert (kept["tasks"], kept["suite"]) == (found["tasks"], "glyphs4")
    assert text.splitlines()[-1] == f"report: {folder}/report.html"
    page = (folder / "report.html").read_text()
    assert (
        "What each step of merging costs" in page and f'<th scope="col">{steps[folder.name][0]}</th>' in page
    )


def test_what_cannot_be_kept_is_printed_all_the_same(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("mingle.runs.explained.write_json", _full)
    assert main(["explain", str(folder)]) == 0
    text = capsys.readouterr().out
    assert NAMES[0] in text and text.endswith("not kept beside the merged model: disk full\n")


def _full(*_, **__):
    raise CheckpointError("disk full")


def test_models_may_be_given(folder, capsys):
    given = f"{NAMES[0]}={expert_folder(tasks.SUITES['glyphs4'][0])}"
    assert main(["explain", str(folder), "--expert", given]) == 0
    assert NAMES[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing", "--expert nothing: expected TASK=MODEL"),
        ("=a", "--expert =a: expected TASK=MODEL"),
        ("latin=a", "--expert latin: no task of that name was merged; there are greek-inverted, hebrew-"),
        (f"{NAMES[0]}=nowhere", "nowhere"),
    ],
)
def test_what_is_wrong_is_named(folder, given, message, capsys):
    assert main(["explain", str(folder), "--expert", given, "--offline"]) == 2
    assert message in capsys.readouterr().out.replace("\n", " ")


def test_a_merge_without_a_suite_needs_one(folder, tmp_path, capsys):
    merger = mingle.Merger.from_pretrained(folder)
    merger.metadata = {}
    merger.save_pretrained(tmp_path / "merged")
    assert main(["explain", str(tmp_path / "merged")]) == 2
    assert "suite: name one" in capsys.readouterr().out
