"""The tables that can be measured: rows, numbers beside the published ones, and what is refused."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from stub_tables import METHODS, NAMES, QUICK, Recorder, measure, request, results

from mingle import suites
from mingle.runs import reproduce
from mingle.runs.orders import shuffled
from mingle.runs.report import comparison
from mingle.runs.reproduce import Request, paper, summary, tables
from mingle.runs.reproduce.expected import expected

pytestmark = pytest.mark.usefixtures("stub")


def test_ends_measures_what_acc_and_bwt_need(tmp_path):
    every, ends = (
        measure(tmp_path / "every", evaluate="every", orders=2),
        measure(tmp_path / "ends", evaluate="ends", orders=2),
    )
    for a, b in zip(every["tables"][0]["rows"], ends["tables"][0]["rows"], strict=True):
        assert a["cells"]["stub"]["acc"] == b["cells"]["stub"]["acc"]
        assert a["cells"]["stub"]["bwt"] == b["cells"]["stub"]["bwt"]
    for found in results(tmp_path / "ends").values():
        assert [[value is not None for value in row] for row in found["matrix"]] == [
            [True],
            [False, True],
            [True] * 3,
        ]


def test_the_table_s_numbers_and_schema(tmp_path):
    out = measure(tmp_path, orders=3)
    assert json.loads((tmp_path / "table.json").read_text()) == json.loads(json.dumps(out))
    assert set(out) == {
        "table",
        "title",
        "axis",
        "orders",
        "set",
        "samples_per_class",
        "seed",
        "versions",
        "tables",
    }
    (table,) = out["tables"]
    assert (table["protocol"], table["suites"]) == ("strict", ["stub"])
    assert [row["label"] for row in table["rows"]] == list(METHODS)
    for row in table["rows"]:
        cell = row["cells"]["stub"]
        measured = [
            json.loads((tmp_path / "cells" / name / "result.json").read_text()) for name in cell["folders"]
        ]
        assert [one["settings"]["order"] for one in measured] == cell["finished"] == [42, 43, 44]
        assert [one["order"] for one in measured] == [shuffled(list(NAMES), seed) for seed in (42, 43, 44)]
        for key in ("acc", "bwt"):
            values = [one[key] for one in measured]
            assert cell[key] == {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values),
                "values": values,
            }
        assert cell["seconds"] == pytest.approx(
            statistics.fmean(sum(step["merge"] for step in one["steps"]) for one in measured)
        )
        assert cell["bytes"] == statistics.fmean(one["bytes"] for one in measured) > 1000
        assert cell["commits"] == sorted({one["commit"] for one in measured if one["commit"]})
        assert cell["devices"] == [measured[0]["device"]["name"]]
        assert "versions" in measured[0]
    mean, std = (table["rows"][1]["cells"]["stub"]["acc"][key] for key in ("mean", "std"))
    text = (tmp_path / "table.md").read_text()
    assert f"{mean:.1f} ± {std:.1f}" in text
    assert "protocol strict, 3 orders, steps=3, rank=4, lr=0.005\n" in text
    assert not list(tmp_path.glob("cells/*/merger"))
    assert (tmp_path / "stub-strict-bars.png").exists()
    page = (tmp_path / "report.html").read_text()
    assert f"{mean:.1f} ± {std:.1f}" in page and "rank=4" in page and cell["devices"][0] in page


def test_measured_stands_beside_published_with_the_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(
        paper, "METHODS", {("mingle", "stub"): (50.0, None), ("average", "other"): (40.0, -2.0)}
    )
    plan = reproduce.plan(request(suites=("stub", "other")))
    reproduce.run(plan, tmp_path, device=torch.device("cpu"))
    rows = {row["label"]: row["cells"] for row in summary.write(plan, tmp_path)["tables"][0]["rows"]}
    assert rows["average"]["stub"]["published"] is rows["average"]["stub"]["difference"] is None
    mingle, average = rows["mingle"]["stub"], rows["average"]["other"]
    assert mingle["published"] == {"acc": 50.0, "bwt": None}
    assert mingle["difference"] == {"acc": mingle["acc"]["mean"] - 50.0, "bwt": None}
    assert average["difference"] == {
        "acc": average["acc"]["mean"] - 40.0,
        "bwt": average["bwt"]["mean"] + 2.0,
    }
    text = (tmp_path / "table.md").read_text()
    headers = [line for line in text.splitlines() if line.startswith("| row")]
    assert headers == [  # too wide for one table
        "| row | stub ACC (%) | stub published | stub difference | stub task unknown (%) "
        "| stub BWT | stub seconds | stub orders |",
        "| row | other ACC (%) | other published | other difference | other task unknown (%) "
        "| other BWT | other published | other difference | other seconds | other orders |",
    ]
    assert f"| 50.0 | {mingle['difference']['acc']:.1f} |".replace("-", "−") in text.replace("**", "")
    assert "measured under the official protocol" in text


def test_a_table_of_before_has_no_unknown_tasks(tmp_path):
    out = measure(tmp_path)
    for path in tmp_path.glob("cells/*/result.json"):
        result = json.loads(path.read_text())
        del result["acc_unknown"], result["unknown"], result["answers"], result["bytes"]
        path.write_text(json.dumps(result))
    assert "task unknown" in comparison.markdown(out)
    found = summary.write(reproduce.plan(request()), tmp_path)
    assert found["tables"][0]["rows"][1]["cells"]["stub"]["acc_unknown"]["values"] == []
    assert "task unknown" not in (tmp_path / "table.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy matrix" in page and "task unknown" not in page and "bytes per task" not in page
    for row in out["tables"][0]["rows"]:
        del row["cells"]["stub"]["acc_unknown"]
    assert "task unknown" not in comparison.markdown(out)


def test_the_published_figures_belong_to_their_rows():
    def row(label, method="mingle", **others):
        return tables.Row(label, method, **others)

    assert expected("main", row("mingle"), "clip-b16-14") == (84.9, -0.9)
    assert expected("main", row("mingle"), "glyphs8") is None
    assert expected("main", row("pre-trained", "pre-trained"), "clip-b32-8") == (48.1, 0.0)
    assert expected("steps", row("mingle, steps 5", options={"steps": 5}), "clip-b16-14") is None
    assert expected("corruptions", row("mingle"), "clip-b32-pixelate") == (37.9, None)
    suite = suites.load("stub")
    ablation = tables.get("ablation").rows(suite, ("mingle", "mingle-light"))
    assert [expected("ablation", one, "clip-b16-8") for one in ablation] == [
        (78.7, -0.5), (86.4, -6.0), (87.4, -2.3), (86.0, -0.1), (88.3, -0.4), *[None] * 5,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "mian"}, "unknown table 'mian'; did you mean 'main'"),
        ({"suites": ("glyphs5",)}, "unknown suite 'glyphs5'"),
        ({"protocols": ("strickt",), "suites": ("glyphs4",)}, "did you mean 'strict'"),
        ({"methods": ("mingel",)}, "unknown method 'mingel'; did you mean 'mingle'"),
        ({"methods": ("mingle-seq", "mingle")}, "sequential methods"),
        (
            {"options": (("alpha", 0.3),), "methods": ("mingle",)},
            "option 'alpha': no method of this table has it",
        ),
        ({"options": (("rank", "many"),)}, "rank"),
        ({"options": (("gamma", 2.0),), "table": "gamma", "methods": ()}, "varies it itself"),
        ({"table": "gamma", "methods": ("average",), "options": ()}, "unknown option 'gamma'"),
        ({"evaluate": "never"}, "expected one of ends, every"),
    ],
)
def test_mistakes_are_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        measure(tmp_path / "out", Recorder(), **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_can_be_planned(name):
    plan = reproduce.plan(Request(name, suites=("glyphs4",), protocols=("strict", "official"), orders=2))
    labels = [
        entry.row.label for entry in plan.entries if entry.protocol == "strict" and entry.suite == "glyphs4"
    ]
    assert len(set(labels)) == len(labels)
    assert len(plan.cells) == len({cell.folder_name for cell in plan.cells}) <= 2 * len(plan.entries)


def test_rows_of_the_tables_are_what_they_say():
    def cells(name):
        return {
            entry.row.label: entry.cells[0]
            for entry in reproduce.plan(Request(name, suites=("glyphs4",))).entries
        }

    ablation = cells("ablation")
    assert [(c.options["gates"], c.options["constraint"]) for c in ablation.values()] == [
        ("static", "relaxed"), ("all", "none"), ("newest", "none"), ("newest", "hard"), ("newest", "relaxed"),
    ]  # fmt: skip
    assert [c.options["steps"] for c in cells("steps").values()] == [5, 10, 20, 50]
    assert [c.samples_per_class for c in cells("samples").values()] == [1, 3, 5]
    grid = cells("layers-and-rank")
    assert {c.options["rank"] for c in grid.values()} == {32, 64, 128}  # the model is 128 wide
    assert len(grid["mlp, rank 32"].options["layers"]) == 2
    assert len(grid["attention, rank 32"].options["layers"]) == 4
    corrupted = {entry.suite for entry in reproduce.plan(Request("corruptions", suites=("glyphs4",))).entries}
    assert len(corrupted) == 8
    assert "glyphs4-motion_blur" in corrupted


def test_a_sweep_is_plotted_with_its_gates(tmp_path):
    changes = {"table": "k", "methods": ("mingle", "mingle-light"), "options": QUICK}
    out = measure(tmp_path, **changes)
    assert {row["series"] for row in out["tables"][0]["rows"]} == {"mingle", "mingle-light"}
    assert [row["value"] for row in out["tables"][0]["rows"]] == [1, 2, 3, 5, 8] * 2
    for name in ("curves", "gates"):
        assert (tmp_path / f"stub-strict-{name}.png").stat().st_size > 10_000
