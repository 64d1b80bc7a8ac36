"""The decomposition benchmark: its matrices, its peers, and that no wrong answer gets a time."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from mingle import linalg
from mingle.bench import decompose, judge, measure, plot, record, table
from mingle.bench.decomposition import cases, check, peers
from mingle.bench.decomposition.cases import (
    ACCURATE,
    CASES,
    EXACT,
    PUBLISHED,
    SKETCH,
    THIN,
    ExpertCase,
    LayerShape,
)
from mingle.bench.decomposition.peers import ExpertPeer, decomposition
from mingle.bench.judge import by_name
from mingle.bench.measure import OURS, Rounds

pytestmark = pytest.mark.slow  # the plain run has siblings of these

CPU = torch.device("cpu")
TOY = ExpertCase("vit-b", "a toy", (LayerShape(60, 44, 3), LayerShape(44, 70, 2)), rank=4, earlier=2)
ONCE = 0.0  # seconds


def toy(shape: LayerShape = TOY.shapes[0], layers: int = 1) -> cases.ExpertProblem:
    return cases.make(TOY, shape, layers, CPU)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """One or two rounds."""
    monkeypatch.setattr(measure, "_FEWEST_EACH", 1)
    monkeypatch.setattr(measure, "_MOST_EACH", 2)


def test_the_layers_of_a_task():
    layers = {
        name: [(shape.m, shape.n, shape.count) for shape in case.shapes] for name, case in CASES.items()
    }
    assert layers == {
        "vit-b": [(768, 768, 48), (3072, 768, 12), (768, 3072, 12)],
        "vit-l": [(1024, 1024, 96), (4096, 1024, 24), (1024, 4096, 24)],
        "llm": [(4096, 4096, 4), (14336, 4096, 3)],
    }
    assert [case.layers for case in CASES.values()] == [72, 144, 7]


@pytest.mark.parametrize("shape", TOY.shapes)
def test_task_vectors_have_the_stated_spectrum_and_earlier_experts_differ(shape):
    problem = toy(shape, layers=2)
    assert problem.deltas.shape == (2, shape.m, shape.n) and problem.deltas.dtype == torch.float32
    for delta in problem.deltas:
        sigma = torch.linalg.svdvals(delta.double())
        torch.testing.assert_close(sigma / sigma.norm(), cases.spectrum(shape.shorter), rtol=1e-5, atol=1e-7)
        assert delta.square().mean().sqrt() == pytest.approx(1e-3, rel=1e-4)
    assert not torch.equal(problem.deltas[0], problem.deltas[1])
    experts = [expert for layer in problem.earlier for expert in layer]
    assert len(experts) == 2 * TOY.earlier and experts[0].A.shape == (TOY.rank, shape.n)
    directions = torch.linalg.svd(torch.cat([expert.A for expert in experts]))[1]
    assert directions[-1] > 1e-2 * directions[0]  # none is another one's repetition
    assert torch.equal(toy(shape, layers=2).deltas, problem.deltas)


def test_both_oracles_agree(monkeypatch):
    delta = toy().deltas[0]
    direct = check.Optimum.of(delta, 4)
    monkeypatch.setattr(check, "_DIRECT", 0)
    for M in (delta, delta.mT):
        squared = check.Optimum.of(M, 4)
        assert squared.residual == pytest.approx(direct.residual, rel=1e-12)
        torch.testing.assert_close(squared.sigma, direct.sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [*TOY.shapes, LayerShape(360, 300, 1)])
def test_every_peer_is_right(shape):
    problem = toy(shape, layers=2)
    candidates = peers.peers(CPU)
    assert candidates[0].name == ACCURATE
    found = by_name(decompose.compared("decompose", problem, candidates, ONCE))
    assert {name for name, row in found.items() if row["status"] != "ok"} == set()
    assert all(row["median"] > 0 and row["ratio"] > 0 and row["repetitions"] for row in found.values())
    excess = {name: row["errors"]["excess"] for name, row in found.items()}
    for exact in (ACCURATE, "torch.linalg.svd thin", "torch.linalg.svd full", "Gram matrix, fp64 eigh"):
        assert excess[exact] < EXACT, exact
    assert found[ACCURATE]["layers"] == 2 and found["torch.linalg.svd thin"]["layers"] == 1


@pytest.mark.parametrize("shape", TOY.shapes)
def test_every_pipeline_makes_the_same_experts(shape):
    problem = toy(shape, layers=2)
    candidates = peers.pipelines(CPU)
    found = decompose.compared("project", problem, candidates, ONCE)
    assert {row["name"] for row in found["rows"] if row["status"] != "ok"} == set()
    assert 1 < found["effective_ranks"][0] <= TOY.rank * TOY.earlier
    (B, A), (B2, A2) = candidates[0].run(problem)[0], candidates[-1].run(problem)[0]
    torch.testing.assert_close(B @ A, B2 @ A2, rtol=0, atol=1e-7)


def without_the_first(M, r):
    U, S, Vh = linalg.svd_lowrank(M, r + 1)
    return U[..., 1:], S[..., 1:], Vh[..., 1:, :]


def skewed(M, r):
    U, S, Vh = linalg.svd_lowrank(M, r)
    return U * 1.001, S / 1.001, Vh


def impossible(M, r):
    raise ZeroDivisionError


def test_a_wrong_peer_is_named_and_gets_no_time():
    def inverted(M, r):
        U, S, Vh = linalg.svd_lowrank(M, r)
        return U, S, -Vh

    def not_finite(M, r):
        return tuple(part * math.nan for part in linalg.svd_lowrank(M, r))

    def inexact(M, r):
        return linalg.svd_lowrank(M, r, oversample=0, power_iters=0)

    wrong = [
        decomposition("wrong", "one short", lambda M, r: linalg.svd_lowrank(M, r - 1), SKETCH),
        decomposition("wrong", "without the first", without_the_first, SKETCH),
        decomposition("wrong", "signs", inverted, SKETCH),
        decomposition("wrong", "skewed", skewed, SKETCH),
        decomposition("wrong", "not finite", not_finite, SKETCH),
        decomposition("wrong", "inexact", inexact, EXACT),
        decomposition("wrong", "layer alone", lambda M, r: linalg.svd_lowrank(M[:1], r), SKETCH),
        decomposition("broken", "", impossible, SKETCH),
    ]
    found = by_name(decompose.compared("decompose", toy(layers=2), [*peers.peers(CPU)[:1], *wrong], ONCE))
    assert found[ACCURATE]["status"] == "ok" and found[ACCURATE]["median"] > 0
    assert {found[peer.name]["status"] for peer in wrong[:-1]} == {"wrong"}
    assert "orthogonality" in found["wrong skewed"]["reason"] and "excess" in found["wrong signs"]["reason"]
    assert "ZeroDivisionError" in found["broken "]["reason"]
    assert not any({"median", "ratio", "seconds"} & found[peer.name].keys() for peer in wrong)
    json.dumps(found, allow_nan=False)


def test_wrong_experts_are_named_and_get_no_time():
    def unprojected(problem):
        return peers.ours(replace(problem, earlier=((),) * problem.layers))

    forgets = ExpertPeer("forgets", unprojected, EXACT, batched=False)
    found = by_name(decompose.compared("project", toy(), [*peers.pipelines(CPU)[:1], forgets], ONCE))
    assert found[OURS]["status"] == "ok"
    assert found["forgets"]["status"] == "wrong" and "median" not in found["forgets"]


def test_what_is_left_out_says_why():
    found = {peer.name: peer.left_out(LayerShape(14336, 4096, 3)) for peer in peers.peers(CPU)}
    assert found["torch.linalg.svd full"] and found["mingle 128/12"]
    assert not found["torch.linalg.svd thin"] and not found[ACCURATE]
    published = peers.pipelines(CPU)[-1]
    assert published.left_out(LayerShape(14336, 4096, 3)) and not published.left_out(
        LayerShape(4096, 4096, 1)
    )
    late = decompose.compared("decompose", toy(), peers.peers(CPU), ONCE, until=0.0)["rows"]
    assert {(row["status"], row["reason"]) for row in late} == {("left out", "no time was left for it")}


def test_slow_peers_are_called_once(monkeypatch):
    for module in (measure, decompose):
        monkeypatch.setattr(module, "SLOW", 0.0)
    calls = []
    ours = decomposition("ours", "", linalg.svd_lowrank, EXACT)
    counted = decomposition("counted", "", lambda M, r: calls.append(0) or linalg.svd_lowrank(M, r), EXACT)
    found = by_name(decompose.compared("decompose", toy(), [ours, counted], ONCE))
    assert len(calls) == 1 and found["counted "]["repetitions"] == 1 and found["ours "]["round_ratio"] == 1


def test_ours_takes_part_in_all_rounds():
    first = {"ours": 5.0, "quick": 0.5, "slow": 9.0}  # ours was disturbed when it was checked
    shares = measure._shares(first, "ours", 1.0)
    assert shares == {"ours": 2, "quick": 2, "slow": 0}
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in first}
    times = measure.interleaved(steps, CPU, Rounds(warm_ups=0), 0, shares)
    assert {name: len(series) for name, series in times.items()} == shares
    assert [sorted(calls[i : i + 2]) for i in (0, 2)] == [["ours", "quick"]] * 2


def test_what_was_in_no_round_is_held_against_our_median():
    def contestant(name, seconds, calls):
        def run():
            calls.append(name)

        return measure.Contestant(name, lambda: (run, {"status": "ok", "first_seconds": seconds}))

    calls = []
    rows, _ = measure.compare(
        [contestant(OURS, 1.0, calls), contestant("slow", 9.0, calls)], CPU, Rounds(each=1.0, warm_ups=0)
    )
    ours, slow = rows
    assert calls == [OURS] and slow["seconds"] == [9.0]
    assert slow["round_ratio"] == 9.0 / ours["median"]


def test_the_results_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decompose, "CASES", {"vit-b": TOY})
    assert decompose.main(["--quick", "--out", str(tmp_path)]) == 0
    found = record.read(tmp_path / "vit-b.json")
    assert (found["format"], found["benchmark"]) == ("mingle-bench", "experts")
    assert {"date", "device", "versions", "commit", "seed", "seconds", "method", "targets"} <= found.keys()
    assert found["model"]["layers"] == 5 and "k^-½" in found["model"]["spectrum"]
    for part, ours in (("decompose", ACCURATE), ("project", OURS)):
        *shapes, whole = [case for case in found["cases"] if case["facts"]["part"] == part]
        facts = [case["facts"] for case in shapes]
        assert [(one["shape"]["count"], one["timed_layers"]) for one in facts] == [(3, 1), (2, 1)]
        by_hand = sum(case["facts"]["shape"]["count"] * by_name(case)[ours]["median"] for case in shapes)
        assert whole["name"] == f"vit-b {part}"
        assert by_name(whole)[ours]["median"] == pytest.approx(by_hand)
        assert by_name(whole)[ours]["round_ratio"] == pytest.approx(1)
    assert [(target["peer"], target["ratio"]) for target in found["targets"]] == [
        (PUBLISHED, 3.0),
        (THIN, 1.6),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"vit-b.json", "curves-vit-b.png", "task-vit-b.png"}
    printed = capsys.readouterr().out
    assert "vit-b decompose" in printed and "target vit-b" in printed
    table.write(found)
    assert plot.write_plots(found, tmp_path, "vit-b")


def test_totals_leave_out_peers_that_lack_a_shape():
    def row(name, seconds, ratio):
        times = dict.fromkeys(("median", "p20", "p80"), seconds)
        ratios = dict.fromkeys(("round_ratio", "round_ratio_p20", "round_ratio_p80"), ratio)
        return {"name": name, "status": "ok", "errors": {"excess": 1e-7}} | times | ratios

    def case(name, count, *rows):
        return {"name": name, "facts": {"shape": {"count": count}}, "rows": list(rows)}

    square = case("4×4", 3, row("a", 1.0, 1.0), row("b", 2.0, 2.0))
    tall = case("8×4", 1, row("a", 5.0, 1.0), {"name": "b", "status": "wrong"})
    found = by_name(decompose.whole(TOY, "decompose", [square, tall], "a"))
    assert found["a"]["median"] == 8.0
    assert found["b"]["status"] == "left out" and "8×4" in found["b"]["reason"] and "median" not in found["b"]
    tall["rows"][1] = row("b", 30.0, 6.0)
    found = by_name(decompose.whole(TOY, "decompose", [square, tall], "a"))
    assert found["b"]["round_ratio"] == pytest.approx(36 / 8)


def test_a_target_is_met_by_exact_results_only():
    def met(excess, ratio=3.5):
        ours = {"name": OURS, "round_ratio": 1.0, "errors": {"excess": excess}}
        rows = [ours, {"name": PUBLISHED, "round_ratio": ratio, "errors": {"excess": 0.0}}]
        judged = judge.targets([{"name": "vit-b project", "rows": rows}], cases.TARGETS, "cpu")
        return [target["met"] for target in judged]

    assert met(1e-6) == [True]
    assert met(1e-4) == [False]
    assert met(1e-6, 2.9) == [False]
