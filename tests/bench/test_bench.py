"""The kernels' benchmark: no wrong answer is timed, and no regression overlooked."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_cases import CPU, LIMITS, tiny

from mingle import cli
from mingle.bench import judge, machine, measure, plot, record, run, table
from mingle.bench.gated_experts import cases, floor, inputs
from mingle.bench.gated_experts.cases import Selection
from mingle.bench.gated_experts.inputs import differentiated
from mingle.bench.gated_experts.peers import PEERS, KernelPeer
from mingle.bench.judge import Target, by_name
from mingle.bench.measure import OURS, Rounds
from mingle.kernels.gated_experts import reference


def one_dropped(case_inputs: inputs.Inputs):
    """Leaves the second expert out."""
    t, keep = case_inputs, [0, 2, 3]
    return differentiated(
        t,
        lambda: reference.gated_experts(
            t.x, t.weight, t.bias, t.A[keep], t.B[keep], t.gate_values()[..., keep]
        ),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_peer_is_named_and_gets_no_time(dtype):
    peers = [
        PEERS[OURS],
        KernelPeer("careless", one_dropped, "one expert short"),
        KernelPeer("broken", lambda t: lambda: 1 / 0, "raises"),
    ]
    result = by_name(run.measure(tiny(dtype=dtype), peers, CPU, LIMITS, 0.0))
    assert result[OURS]["status"] == "ok" and result[OURS]["median"] > 0
    assert result["careless"]["status"] == "wrong" and result["careless"]["errors"]["y"] > 0.05
    assert "y is off by" in result["careless"]["reason"]
    assert result["broken"]["status"] == "failed" and "ZeroDivisionError" in result["broken"]["reason"]
    for name in ("careless", "broken"):
        assert not {"median", "seconds", "ratio", "peak_bytes"} & result[name].keys()


def test_not_a_number_is_wrong_and_fits_into_json():
    peer = KernelPeer("poisoned", lambda t: lambda: {"y": torch.full_like(t.dy, float("nan"))}, "NaN")
    result = by_name(run.measure(tiny(), [peer], CPU, LIMITS, 0.0))["poisoned"]
    assert result["status"] == "wrong"
    assert result["errors"] == {"y": None}


def test_every_round_times_every_peer_and_memory_is_what_was_allocated():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) or {} for name in "abc"}
    times = measure.interleaved(steps, CPU, Rounds())
    rounds = [sorted(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == [["a", "b", "c"]] * len(rounds) and {len(series) for series in times.values()} == {
        len(rounds) - 1
    }
    assert machine.peak_bytes(lambda: {"y": torch.empty(1000).add_(1) + 1}, CPU) == pytest.approx(
        8000, abs=200
    )
    assert measure.relative([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])["round_ratio"] == 2


@pytest.fixture
def found(monkeypatch) -> dict:
    """Of a run with two tiny cases."""
    monkeypatch.setattr(floor, "ceilings", lambda dtypes, device: LIMITS)
    two = (tiny(), tiny("batch", name="tiny-batch", backward=True))
    return run.run(Selection(two, seconds=0), (OURS, "mingle grouped", "eager loop", "grouped eager"), CPU)


def test_the_command_line_writes_results_and_plots(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(floor, "ceilings", lambda dtypes, device: LIMITS)
    monkeypatch.setitem(cases.CASES, "tiny", tiny())
    monkeypatch.setattr(run, "_SECONDS", 0.0)
    out = tmp_path / "new" / "results.json"
    chosen = ["--case", "tiny", "--peer", "eager loop", "--peer", "nn.Linear", "--device", "cpu"]
    assert cli.main(["bench", *chosen, "--out", str(out), "--plots", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "eager loop" in printed and "× ours" in printed
    found = record.read(out)
    about = {
        "format",
        "date",
        "commit",
        "versions",
        "device",
        "seed",
        "seconds",
        "ceilings",
        "cases",
        "targets",
    }
    assert about <= found.keys() and found["benchmark"] == "kernels"
    assert {"torch", "triton", "transformers", "mingle", "python"} <= found["versions"].keys()
    assert {"type", "name", "threads"} <= found["device"].keys()
    (case,) = found["cases"]
    assert {
        "name",
        "title",
        "facts",
        "rows",
        "count",
        "floor",
        "dispatch",
        "cpus_used_by_others",
    } == case.keys()
    rows = by_name(case)
    assert set(rows) == {OURS, "eager loop", "nn.Linear"}
    ours = rows[OURS]
    assert ours["repetitions"] == len(ours["seconds"]) >= 5
    assert ours["p20"] <= ours["median"] <= ours["p80"] and ours["ratio"] == ours["round_ratio"] == 1
    assert ours["floor_fraction"] == pytest.approx(case["floor"]["seconds"] / ours["median"])
    assert ours["peak_bytes"] >= 3 * 5 * 40 * 4
    assert rows["nn.Linear"]["status"] == "bound" and rows["nn.Linear"]["errors"] is None
    assert (tmp_path / "bars-tiny.png").stat().st_size > 10_000 and (
        tmp_path / "roofline.png"
    ).stat().st_size > 10_000
    status = cli.main(
        ["bench", *chosen, "--compare", str(out)]
    )  # on so small a case noise may look like a regression
    assert ("takes" if status else "no regression") in capsys.readouterr().out


def test_no_case_is_started_too_late(monkeypatch):
    monkeypatch.setattr(floor, "ceilings", lambda dtypes, device: LIMITS)
    two = Selection((tiny(), tiny("batch", name="tiny-batch")), seconds=0)
    assert run.run(two, (OURS,), CPU, until=0)["cases"] == []
    assert len(run.run(two, (OURS,), CPU, until=60)["cases"]) == 2


def test_a_regression_is_flagged(found):
    assert judge.regressions(found, found) == []
    worse = copy.deepcopy(found)
    first, second = (by_name(case) for case in worse["cases"])
    second["grouped eager"]["round_ratio"] /= 1.2
    second["mingle grouped"]["round_ratio"] /= 2  # ours as well: says nothing
    (line,) = judge.regressions(found, worse)
    assert line.startswith("tiny-batch: grouped eager takes") and "-17%" in line
    first[OURS]["status"] = "wrong"
    assert "tiny: mingle is wrong, it was ok" in judge.regressions(found, worse)


def test_targets_and_dispatch(found):
    case = found["cases"][0]
    assert case["dispatch"]["best"] in ("mingle grouped", "grouped eager")
    rows = [{"name": OURS, "round_ratio": 1.0}, {"name": "eager loop", "round_ratio": 1.5}]
    judged = [{"name": "square-sample-fp32", "rows": rows}]
    (target,) = judge.targets(judged, cases.TARGETS, "cpu")
    assert (target["case"], target["peer"], target["ratio"]) == ("square-sample-fp32", "eager loop", 2)
    assert (target["ours"], target["found"], target["met"]) == (OURS, 1.5, False)
    rows.append({"name": "mingle prepacked", "round_ratio": 0.6})
    both = judge.targets(judged, cases.TARGETS, "cpu")
    assert [(target["found"], target["met"]) for target in both] == [(1.5, False), (2.5, True)]
    for target in cases.TARGETS:
        assert target.case in cases.CASES and target.peer in PEERS and target.ours in PEERS


def test_a_ratio_to_another_form_of_ours_is_taken_round_by_round():
    rows = [{"name": "mingle x", "seconds": [1.0, 2.0, 4.0]}, {"name": "peer", "seconds": [2.0, 6.0, 16.0]}]
    (target,) = judge.targets([{"name": "a", "rows": rows}], [Target("a", "peer", 3.0, "mingle x")], "cpu")
    assert target["found"] == 3.0 and target["met"]
    assert (
        judge.targets(
            [{"name": "a", "rows": rows}], [Target("a", "peer", 3.0, "mingle x", device="cuda")], "cpu"
        )
        == []
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--case", "sqare-sample-fp32"],
            "no case is called 'sqare-sample-fp32'; did you mean 'square-sample-fp32'?",
        ),
        (
            ["--case", "square-sample-fp32", "--peer", "eager lop"],
            "no peer is called 'eager lop'; did you mean 'eager loop'?",
        ),
        (["--compare", "absent.json"], "absent.json"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_selections_and_the_script(tmp_path):
    for selection in cases.SELECTIONS.values():
        assert selection.cases and selection.seconds > 0
    assert all(case.dtype != "float16" for case in cases.SELECTIONS["quick"].cases)
    script = Path(__file__).parents[2] / "bench" / "run.py"
    listed = subprocess.run(
        [sys.executable, str(script), "--list"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert '--peer "peft x-lora"' in listed.stdout and "--case square-sample-fp32" in listed.stdout


def test_results_without_cases_draw_nothing(tmp_path):
    assert plot.write_plots({"benchmark": "kernels", "cases": []}, tmp_path, "kernels") == []


#: of benchmarks and studies of them; a demo and what `mingle explain` finds have forms of their own
COMMITTED = [
    path
    for path in sorted((Path(__file__).parents[2] / "bench" / "results").glob("*/[dekn]*/*.json"))
    if path.parent.name not in ("demo", "explain")
]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_read_shown_and_drawn(path, tmp_path, capsys):
    found = record.read(path)
    assert all({"name", "title", "facts", "rows"} <= case.keys() for case in found["cases"])
    assert all({"name", "status"} <= row.keys() for case in found["cases"] for row in case["rows"])
    table.write(found)
    assert found["cases"][0]["name"] in capsys.readouterr().out
    swept = "exponents" in found["cases"][0]  # what grows is drawn by its study
    assert bool(plot.write_plots(found, tmp_path, path.stem)) != swept
