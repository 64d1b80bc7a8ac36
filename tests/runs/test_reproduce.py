"""Tables measured cell by cell: resumed, shared between processes, and gathered to the letter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from stub_tables import NAMES, QUICK, Recorder, measure, request, results

from mingle import suites
from mingle.cli import main
from mingle.io.locks import lock
from mingle.merging.merger import Merger
from mingle.runs import reproduce
from mingle.runs.observer import Observer
from mingle.runs.orders import shuffled
from mingle.runs.reproduce import summary, work

pytestmark = pytest.mark.usefixtures("stub")


class Killed(Exception):
    pass


class KillAt(Observer):
    """Ends the run when a method is about to merge its task `index`."""

    def __init__(self, method: str, index: int) -> None:
        self.at = (method, index)

    def merging(self, method: str, order: int, index: int, names: Sequence[str]) -> None:
        if (method, index) == self.at:
            raise Killed


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
    assert found["unknown"] == result.unknown
    assert (found["acc"], found["bwt"]) == (result.acc, result.bwt)
    assert found["acc_unknown"] == result.acc_unknown < result.acc
    cell = out["tables"][0]["rows"][0]["cells"]["stub"]
    for key, value in (("acc", result.acc), ("acc_unknown", result.acc_unknown)):
        assert cell[key] == {"mean": value, "std": None, "values": [value]}
    kept = Merger.from_pretrained(tmp_path / "cells" / cell["folders"][0] / "merger")
    assert kept.matrix == result.matrix


def test_an_unfinished_table_says_what_is_finished(tmp_path):
    with pytest.raises(Killed):
        measure(tmp_path, KillAt("mingle", 1))
    rows = summary.write(reproduce.plan(request()), tmp_path)["tables"][0]["rows"]
    assert [row["cells"]["stub"]["finished"] for row in rows] == [[42], [42], []]
    assert rows[2]["cells"]["stub"]["acc"] == {"mean": None, "std": None, "values": []}
    assert "| mingle | – | – | – | – | 0 of 1 |" in (tmp_path / "table.md").read_text()


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


def command(out: Path) -> list[str]:
    return [
        sys.executable, "-m", "mingle", "reproduce", "main", "--suite", "glyphs4",
        "--methods", "average,mingle", "--set", "steps=1", "--set", "rank=4",
        "--threads", "1", "--out", str(out),
    ]  # fmt: skip


@pytest.mark.slow
def test_processes_share_the_work_and_survive_a_kill(tmp_path, capsys):
    """One process is killed in the middle of a cell; two others end the table, each cell measured once, as
    one process would.
    """
    out, whole = tmp_path / "shared", tmp_path / "whole"
    victim = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    begun = False
    while not begun and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
        with suppress(FileNotFoundError):  # a folder may be tried, and removed, while it is looked at
            begun = any(out.glob("cells/*/merger/manifest.json"))
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
