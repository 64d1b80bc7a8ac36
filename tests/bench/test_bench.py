"""The kernels' benchmark: counts, peers, and that no wrong answer is timed and no regression overlooked."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mingle import cli
from mingle.bench import judge, machine, measure, plot, record, run, table
from mingle.bench.gated_experts import cases, check, floor, handmade, inputs
from mingle.bench.gated_experts.cases import KernelCase, Selection
from mingle.bench.gated_experts.inputs import differentiated
from mingle.bench.gated_experts.peers import PEERS, SLOW_TO_BUILD, KernelPeer
from mingle.bench.judge import Target, by_name
from mingle.bench.measure import OURS, Rounds, Unavailable
from mingle.kernels.gated_experts import reference

CPU = torch.device("cpu")
LIMITS = floor.Ceilings({"float32": 1e11, "bfloat16": 2e11, "float16": 1e11}, 1e10)


def tiny(reduce: str = "sample", **changes) -> KernelCase:
    return replace(KernelCase("tiny", 3, 5, 48, 40, 4, rank=16, reduce=reduce), **changes)


@pytest.mark.parametrize(
    ("shape", "giga_flop", "base", "mega_bytes", "chain"),
    [("vit-b16", 129.7, 29.7, 254, 461), ("vit-b32", 6.9, 3.8, 17.7, None), ("image", 0.26, 0.06, 5.6, None)],
)
def test_counts_are_those_of_the_published_table(shape, giga_flop, base, mega_bytes, chain):
    case = cases.CASES[f"{shape}-token-bf16"]
    count = floor.count(case)
    assert count.algorithm == "low-rank"
    assert count.flop / 1e9 == pytest.approx(giga_flop, rel=0.02)
    assert count.base_flop / 1e9 == pytest.approx(base, rel=0.02)
    assert count.bytes / 1e6 == pytest.approx(mega_bytes, rel=0.01)
    if chain:
        assert floor.work(case).chain_bytes / 1e6 == pytest.approx(chain, rel=0.01)


def test_the_floor_of_the_large_case_on_an_h100():
    seconds, bound = floor.floor(
        cases.CASES["vit-b16-token-bf16"], floor.Ceilings({"bfloat16": 798e12}, 3e12)
    )
    assert bound == "arithmetic"
    assert seconds == pytest.approx(162e-6, rel=0.01)


@pytest.mark.parametrize(("d_out", "threshold"), [(768, 384), (3072, 614)])
def test_folding_is_counted_where_it_is_cheaper(d_out, threshold):
    below, above = (KernelCase("", 1, threshold + more, 768, d_out, 8, reduce="batch") for more in (-2, 2))
    assert floor.count(below).algorithm == "low-rank"
    assert floor.count(above).algorithm == "folded"
    assert floor.work(above).forward_flop / floor.work(above).folded_forward_flop == pytest.approx(
        1, rel=0.02
    )


def test_a_backward_pass_doubles_the_products_and_routing_counts_one_expert():
    case = tiny(backward=True)
    assert 1.9 < floor.count(case).flop / floor.count(tiny()).flop < 2.2
    assert floor.count(case).bytes > 2 * floor.count(tiny()).bytes
    assert floor.work(tiny(routed=True)).forward_flop == pytest.approx(
        floor.work(tiny(experts=1)).forward_flop, rel=0.02
    )


def test_ceilings_are_the_work_over_the_shortest_time(monkeypatch):
    clock = iter([0.0, 7.0, 10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls = []
    assert floor.fastest(lambda: calls.append(None), CPU, repetitions=3) == 0.5 and len(calls) == 3
    for seconds in (0.5, 0.25):
        monkeypatch.setattr(floor, "fastest", lambda run, device, seconds=seconds: (run(), seconds)[1])
        limits = floor.ceilings(["float32"], CPU, gemm_size=64, copy_bytes=2**16)
        assert limits.flop_per_second == {"float32": 2 * 64**3 / seconds}
        assert limits.bytes_per_second == 2 * 2**16 / seconds


#: what has to run on any CPU, by what the gates are reduced over
EVERYWHERE = {"mingle", "mingle eager", "mingle grouped", "eager loop", "grouped eager", "peft x-lora"}
ALSO = {"token": set(), "sample": {"per-sample merge"}, "batch": {"fold eager", "dense merge"}}


def agreeing(case: KernelCase) -> set[str]:
    """The peers that can run and compute the case's function, once found to agree with the oracle."""
    case_inputs, agreed = inputs.make(case, CPU), set()
    for name, peer in PEERS.items():
        if name in SLOW_TO_BUILD:
            continue
        try:
            adapted = peer.adapt(case_inputs)
            run_once = peer.build(adapted)
        except Unavailable:
            continue
        if not peer.same(case):
            assert run_once()
            continue
        errors = check.Oracle(adapted).errors(run_once)
        assert errors.keys() == ({"y", *case_inputs.differentiated()} if case.backward else {"y"})
        assert max(errors.values()) <= check.tolerance(adapted.x.dtype, CPU), (name, errors)
        agreed.add(name)
    return agreed


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
def test_peers_agree_with_the_oracle(reduce, backward):
    pytest.importorskip("peft")
    folded = {"folded weight"} if reduce == "batch" and not backward else set()
    assert agreeing(tiny(reduce, backward=backward)) >= EVERYWHERE | ALSO[reduce] | folded
    assert agreeing(tiny(reduce, backward=backward, dtype="bfloat16")) >= EVERYWHERE | ALSO[
        reduce
    ] | folded | {"eager loop fp32"}


@pytest.mark.parametrize("backward", [False, True])
def test_peers_agree_with_the_oracle_where_a_router_gives_the_gates(backward):
    pytest.importorskip("peft")
    routed = tiny(routed=True, samples=8, backward=backward)
    assert agreeing(routed) >= EVERYWHERE | ALSO["sample"] | {"mingle one expert"}


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_the_compiled_peer_agrees_with_the_oracle():
    case_inputs = inputs.make(tiny(), CPU)
    assert check.Oracle(case_inputs).errors(PEERS["grouped compiled"].build(case_inputs))["y"] < 2e-6


def test_every_sample_and_gradient_of_large_cases_is_checked():
    for reduce in reference.REDUCTIONS:
        case_inputs = inputs.make(tiny(reduce, samples=8, backward=True), CPU)
        dy, oracle = case_inputs.dy.clone(), check.Oracle(case_inputs)
        assert len(oracle.expected["y"]) == 8 and oracle.expected.keys() == {
            "y",
            "x",
            "gate_weight",
            "gate_bias",
        }
        right = PEERS["eager loop"].build(case_inputs)
        assert max(oracle.errors(right).values()) < 2e-6
        assert torch.equal(case_inputs.dy, dy)
        for name, found in right().items():  # an error anywhere is seen
            wrong = right() | {name: 1.01 * found}
            assert oracle.errors(lambda wrong=wrong: wrong)[name] > 5e-3


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


COMMITTED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*/[dekn]*/*.json"))


@pytest.mark.parametrize(
    "path", [path for path in COMMITTED if "demo" not in path.parts], ids=lambda path: path.stem
)
def test_committed_results_are_read_shown_and_drawn(path, tmp_path, capsys):
    found = record.read(path)
    assert all({"name", "title", "facts", "rows"} <= case.keys() for case in found["cases"])
    assert all({"name", "status"} <= row.keys() for case in found["cases"] for row in case["rows"])
    table.write(found)
    assert found["cases"][0]["name"] in capsys.readouterr().out
    swept = "exponents" in found["cases"][0]  # what grows is drawn by its study
    assert bool(plot.write_plots(found, tmp_path, path.stem)) != swept


def test_the_handmade_chain_is_the_same_in_place_and_not():
    t = inputs.make(tiny("token"), CPU)
    down, up = t.side_by_side()
    torch.testing.assert_close(
        handmade.chain(t, down, up, in_place=True), handmade.chain(t, down, up, in_place=False)
    )
