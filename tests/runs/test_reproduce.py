"""Tables measured cell by cell: resumed, shared between processes, refused early, and gathered to the letter."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mingle import suites
from mingle.cli import main
from mingle.io.files import lock
from mingle.merging.merger import Merger
from mingle.runs import reproduce
from mingle.runs.observer import Observer
from mingle.runs.orders import shuffled
from mingle.runs.reproduce import Request, paper, summary, tables, work
from mingle.runs.reproduce.expected import expected
from mingle.suites import Suite
from mingle.suites.protocol import SeedRequest

NAMES = ("one", "two", "three")
QUICK = (("steps", 3), ("rank", 4), ("lr", 5e-3))
METHODS = ("pre-trained", "average", "mingle")


@pytest.fixture(autouse=True)
def stub(monkeypatch, base_folder, tuned_folders, samples):
    """A suite ``stub`` of three tasks of a tiny model; its sequential methods have nothing to run on."""
    load = suites.load

    def loader(name, *, protocol="strict", samples_per_class=5, seed=0, **others):
        if name not in ("stub", "other"):
            return load(name, protocol=protocol, samples_per_class=samples_per_class, seed=seed, **others)
        return Suite(
            name,
            "clip",
            base_folder,
            {task: lambda i=i: samples[i] for i, task in enumerate(NAMES)},
            {task: lambda i=i: tuned_folders[i] for i, task in enumerate(NAMES)},
            SeedRequest(protocol, min(samples_per_class, 3), seed),
        )

    monkeypatch.setattr(suites, "load", loader)


def request(table: str = "main", **changes) -> Request:
    return Request(table, **({"suites": ("stub",), "methods": METHODS, "options": QUICK} | changes))


def measure(out: Path, observer: Observer | None = None, keep_models: bool = False, **changes) -> dict:
    plan = reproduce.plan(request(**changes))
    reproduce.run(plan, out, observer, device=torch.device("cpu"), keep_models=keep_models)
    return summary.write(plan, out)


def results(out: Path) -> dict[str, dict]:
    """result.json by folder, without seconds."""
    found = {}
    for path in sorted(out.glob("cells/*/result.json")):
        found[path.parent.name] = {
            key: value
            for key, value in json.loads(path.read_text()).items()
            if key not in ("seconds", "steps")
        }
    return found


class Killed(Exception):
    pass


class KillAt(Observer):
    """Ends the run when a method is about to merge its task `index`."""

    def __init__(self, method: str, index: int) -> None:
        self.at = (method, index)

    def merging(self, method: str, order: int, index: int, names: Sequence[str]) -> None:
        if (method, index) == self.at:
            raise Killed


class Recorder(Observer):
    def __init__(self) -> None:
        self.merged_tasks: list[tuple[str, int, int]] = []

    def merging(self, method: str, order: int, index: int, names: Sequence[str]) -> None:
        self.merged_tasks.append((method, order, index))


@pytest.mark.parametrize("method", ["individual", "opcm", "consensus-ta", "mingle", "routed"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, method):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {
        "keep_models": True,
        "methods": (method,),
        "options": {"mingle": QUICK, "routed": (("depths", (0, 1)),)}.get(method, ()),
    }
    measure(whole, **changes)
    with pytest.raises(Killed):
        measure(broken, KillAt(method, 2), **changes)
    assert not list(broken.glob("cells/*/result.json"))
    seen = Recorder()
    measure(broken, seen, **changes)
    assert seen.merged_tasks == [(method, 0, 2)]
    assert results(whole) == results(broken) != {}
    models = [
        json.loads(next(out.glob("cells/*/merger/manifest.json")).read_text()) for out in (whole, broken)
    ]
    assert [task["tensors"] for task in models[0]["tasks"]] == [
        task["tensors"] for task in models[1]["tasks"]
    ]
    assert models[0]["state"] == models[1]["state"]
    traces = [path.read_text() for out in (whole, broken) for path in out.glob("cells/*/trace.json")]
    assert traces[0] == traces[1]
    assert (len(traces[0]) > 100) == (method == "mingle")


def test_a_cell_is_what_a_merger_measures(tmp_path, samples, tuned_folders):
    out = measure(tmp_path, methods=("mingle",), evaluate="every", keep_models=True)
    suite = suites.load("stub")
    order = shuffled(list(NAMES), 42)
    merger = Merger(suite.base, "mingle", steps=3, rank=4, lr=5e-3)
    for name in order:
        merger.add(name, suite.expert(name), suite.seeds(name))
        result = merger.evaluate(suite)
    (found,) = results(tmp_path).values()
    assert found["matrix"] == result.matrix
    assert (found["acc"], found["bwt"]) == (result.acc, result.bwt)
    cell = out["tables"][0]["rows"][0]["cells"]["stub"]
    assert cell["acc"] == {"mean": result.acc, "std": None, "values": [result.acc]}
    kept = Merger.from_pretrained(tmp_path / "cells" / cell["folders"][0] / "merger")
    assert kept.matrix == result.matrix


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
        assert {"versions", "commit", "device"} <= set(measured[0])
    mean, std = (table["rows"][1]["cells"]["stub"]["acc"][key] for key in ("mean", "std"))
    text = (tmp_path / "table.md").read_text()
    assert f"{mean:.1f} ± {std:.1f}" in text
    assert "protocol strict, 3 orders, steps=3, rank=4, lr=0.005\n" in text
    assert not list(tmp_path.glob("cells/*/merger"))
    assert (tmp_path / "stub-strict-bars.png").exists()


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
        "| row | stub ACC (%) | stub published | stub difference | stub BWT | stub seconds | stub orders |",
        "| row | other ACC (%) | other published | other difference | other BWT | other published | other difference | other seconds "
        "| other orders |",
    ]
    assert f"| 50.0 | {mingle['difference']['acc']:.1f} |".replace("-", "−") in text.replace("**", "")
    assert "measured under the protocol official" in text


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


def test_an_unfinished_table_says_what_is_finished(tmp_path):
    with pytest.raises(Killed):
        measure(tmp_path, KillAt("mingle", 1))
    rows = summary.write(reproduce.plan(request()), tmp_path)["tables"][0]["rows"]
    assert [row["cells"]["stub"]["finished"] for row in rows] == [[42], [42], []]
    assert rows[2]["cells"]["stub"]["acc"] == {"mean": None, "std": None, "values": []}
    assert "| mingle | – | – | – | 0 of 1 |" in (tmp_path / "table.md").read_text()


def test_a_finished_table_runs_nothing_and_a_changed_option_only_its_own_cells(tmp_path):
    measure(tmp_path)
    seen = Recorder()
    measure(tmp_path, seen)
    assert seen.merged_tasks == []
    measure(tmp_path, seen, options=(*QUICK, ("gamma", 2.0)))
    assert seen.merged_tasks == [("mingle", 0, index) for index in range(3)]
    seen = Recorder()
    measure(tmp_path, seen, orders=2)
    assert {order for _, order, _ in seen.merged_tasks} == {1}


def test_protocols_make_two_tables_of_different_cells(tmp_path):
    out = measure(tmp_path, protocols=("strict", "official"), methods=("mingle",))
    assert [table["protocol"] for table in out["tables"]] == ["strict", "official"]
    folders = [set(table["rows"][0]["cells"]["stub"]["folders"]) for table in out["tables"]]
    assert folders[0].isdisjoint(folders[1])
    reduces = {
        found["settings"]["protocol"]: found["settings"]["options"]["reduce"]
        for found in results(tmp_path).values()
    }
    assert reduces == {"strict": "sample", "official": "batch"}
    text = (tmp_path / "table.md").read_text()
    assert text.count("protocol strict") == text.count("protocol official") == 1


def test_a_held_cell_is_passed_over_and_looked_at_again(tmp_path, monkeypatch):
    """Another writer holds the first cell: the others are run first, and it once the lock is free."""
    monkeypatch.setattr(work, "_POLL_SECONDS", 0.01)
    plan = reproduce.plan(request())
    first = tmp_path / "cells" / plan.cells[0].folder_name
    first.mkdir(parents=True)
    holder = lock(first)
    holder.__enter__()
    seen = Recorder()
    worker = threading.Thread(target=lambda: reproduce.run(plan, tmp_path, seen, device=torch.device("cpu")))
    worker.start()
    deadline = time.monotonic() + 60
    while len(results(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {method for method, _, _ in seen.merged_tasks} == {"average", "mingle"}
    assert worker.is_alive()
    holder.__exit__(None, None, None)
    worker.join(60)
    assert not worker.is_alive()
    assert seen.merged_tasks[-1][0] == "pre-trained"
    assert len(results(tmp_path)) == 3


def test_a_diverged_cell_is_a_result(tmp_path):
    rows = measure(tmp_path, options=(("steps", 6), ("rank", 4), ("lr", 1e30)), methods=("mingle",))[
        "tables"
    ][0]["rows"]
    cell = rows[0]["cells"]["stub"]
    assert cell["finished"] == []
    assert "not finite" in cell["failed"]["42"]
    assert "0 of 1, 1 diverged" in (tmp_path / "table.md").read_text()


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


def test_the_commands_refuse_with_a_message(tmp_path, capsys):
    for arguments in (
        ["mian"],
        ["main", "--suite", "glyphs5"],
        ["main", "--methods", "mingel"],
        ["main", "--set", "gama=1"],
    ):
        assert main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out.count("error:") == 4
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


def command(out: Path) -> list[str]:
    return [
        sys.executable, "-m", "mingle", "reproduce", "main", "--suite", "glyphs4", "--methods", "average,mingle",
        "--set", "steps=1", "--set", "rank=4", "--threads", "1", "--out", str(out),
    ]  # fmt: skip


def test_processes_share_the_work_and_survive_a_kill(tmp_path, capsys):
    """One process is killed in the middle of a cell; two others end the table, each cell measured once, as
    one process would.
    """
    out, whole = tmp_path / "shared", tmp_path / "whole"
    victim = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        not list(out.glob("cells/*/merger/manifest.json"))
        and victim.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    before = results(out)
    assert len(before) < 2
    other = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert main(command(out)[3:]) == 0
    outputs = [other.communicate(timeout=240)[0], capsys.readouterr().out]
    assert other.returncode == 0, outputs[0]
    done = [line for output in outputs for line in output.splitlines() if ", order 1: ACC" in line]
    assert len(done) == len({line.split(",")[0] for line in done}) == 2 - len(before)
    assert all("2 of 2" not in output and "1 of 1" in output for output in outputs)
    assert main(command(whole)[3:]) == 0
    assert results(out) == results(whole)
    assert len(results(whole)) == 2
