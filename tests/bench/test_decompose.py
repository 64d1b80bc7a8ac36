"""The decomposition benchmark: its matrices, its peers, that no wrong answer gets a time, and what it
predicts by counting.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mingle import linalg
from mingle.bench import decompose
from mingle.bench.decomposition import cases, check, judge, measure, peers, pipelines, plots, predict, show
from mingle.bench.decomposition.cases import CASES, Case, Shape
from mingle.bench.decomposition.measure import Budget
from mingle.bench.decomposition.peers import ACCURATE, EXACT, OURS, SKETCH, Peer
from mingle.bench.decomposition.pipelines import PUBLISHED, THIN, Pipeline
from mingle.linalg import basis, svd
from mingle.methods import experts

CPU = torch.device("cpu")
TOY = Case("vit-b", "a toy", (Shape(60, 44, 3), Shape(44, 70, 2)), rank=4, earlier=2)
ONCE = Budget(seconds=0.0)


def toy(shape: Shape = TOY.shapes[0], layers: int = 1) -> cases.Problem:
    return cases.make(TOY, shape, layers, CPU)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """One or two rounds."""
    monkeypatch.setattr(measure, "_FEWEST", 1)
    monkeypatch.setattr(measure, "_MOST", 2)


def test_the_layers_of_a_task():
    layers = {
        name: [(shape.m, shape.n, shape.count) for shape in case.shapes] for name, case in CASES.items()
    }
    assert layers == {
        "vit-b": [(768, 768, 48), (3072, 768, 12), (768, 3072, 12)],
        "vit-l": [(1024, 1024, 96), (4096, 1024, 24), (1024, 4096, 24)],
        "llm": [(4096, 4096, 4), (14336, 4096, 3)],
    }
    assert [cases.total_layers(case.shapes) for case in CASES.values()] == [72, 144, 7]


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


@pytest.mark.parametrize("shape", [*TOY.shapes, Shape(360, 300, 1)])
def test_every_peer_is_right(shape):
    problem = toy(shape, layers=2)
    candidates = peers.peers(CPU)
    assert candidates[0].name == ACCURATE
    found = measure.decompositions(problem, candidates, ONCE)
    assert {name for name, peer in found["peers"].items() if peer["status"] != "ok"} == set()
    assert all(
        peer["median"] > 0 and peer["ratio"] > 0 and peer["repetitions"] for peer in found["peers"].values()
    )
    excess = {name: peer["errors"]["excess"] for name, peer in found["peers"].items()}
    for exact in (ACCURATE, "torch.linalg.svd thin", "torch.linalg.svd full", "Gram matrix, fp64 eigh"):
        assert excess[exact] < EXACT, exact
    assert found["peers"][ACCURATE]["layers"] == 2 and found["peers"]["torch.linalg.svd thin"]["layers"] == 1


@pytest.mark.parametrize("shape", TOY.shapes)
def test_every_pipeline_makes_the_same_experts(shape):
    problem = toy(shape, layers=2)
    candidates = pipelines.pipelines(CPU)
    found = measure.pipelines(problem, candidates, ONCE)
    assert {name for name, peer in found["peers"].items() if peer["status"] != "ok"} == set()
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
    wrong = [
        Peer("wrong", "one short", lambda M, r: linalg.svd_lowrank(M, r - 1), SKETCH),
        Peer("wrong", "without the first", without_the_first, SKETCH),
        Peer(
            "wrong", "signs", lambda M, r: (lambda U, S, Vh: (U, S, -Vh))(*linalg.svd_lowrank(M, r)), SKETCH
        ),
        Peer("wrong", "skewed", skewed, SKETCH),
        Peer(
            "wrong",
            "not finite",
            lambda M, r: tuple(part * math.nan for part in linalg.svd_lowrank(M, r)),
            SKETCH,
        ),
        Peer("wrong", "inexact", lambda M, r: linalg.svd_lowrank(M, r, oversample=0, power_iters=0), EXACT),
        Peer("wrong", "layer alone", lambda M, r: linalg.svd_lowrank(M[:1], r), SKETCH),
        Peer("broken", "", impossible, SKETCH),
    ]
    found = measure.decompositions(toy(layers=2), [*peers.peers(CPU)[:1], *wrong], ONCE)["peers"]
    assert found[ACCURATE]["status"] == "ok" and found[ACCURATE]["median"] > 0
    assert {found[peer.name]["status"] for peer in wrong[:-1]} == {"wrong"}
    assert "orthogonality" in found["wrong skewed"]["reason"] and "excess" in found["wrong signs"]["reason"]
    assert "ZeroDivisionError" in found["broken "]["reason"]
    assert not any({"median", "ratio", "seconds"} & found[peer.name].keys() for peer in wrong)
    json.dumps(found, allow_nan=False)


def test_wrong_experts_are_named_and_get_no_time():
    def unprojected(problem):
        return pipelines.ours(replace(problem, earlier=((),) * problem.layers))

    found = measure.pipelines(
        toy(), [*pipelines.pipelines(CPU)[:1], Pipeline("forgets", unprojected, EXACT, "")], ONCE
    )["peers"]
    assert found[OURS]["status"] == "ok"
    assert found["forgets"]["status"] == "wrong" and "median" not in found["forgets"]


def test_what_is_left_out_says_why():
    found = {peer.name: peer.left_out(Shape(14336, 4096, 3)) for peer in peers.peers(CPU)}
    assert (
        found["torch.linalg.svd full"]
        and found["mingle 128/12"]
        and not found["torch.linalg.svd thin"]
        and not found[ACCURATE]
    )
    assert pipelines.pipelines(CPU)[-1].left_out(Shape(14336, 4096, 3)) and not pipelines.pipelines(CPU)[
        -1
    ].left_out(Shape(4096, 4096, 1))
    late = measure.decompositions(toy(), peers.peers(CPU), Budget(0.0, until=0.0))["peers"]
    assert {(peer["status"], peer["reason"]) for peer in late.values()} == {
        ("left out", "no time was left for it")
    }


def test_slow_peers_are_called_once(monkeypatch):
    monkeypatch.setattr(measure, "SLOW", 0.0)
    calls = []
    ours = Peer("ours", "", linalg.svd_lowrank, EXACT)
    counted = Peer("counted", "", lambda M, r: calls.append(0) or linalg.svd_lowrank(M, r), EXACT)
    found = measure.decompositions(toy(), [ours, counted], ONCE)["peers"]
    assert len(calls) == 1 and found["counted "]["repetitions"] == 1 and found["ours "]["round_ratio"] == 1


def test_ours_takes_part_in_all_rounds():
    steps = dict.fromkeys(("ours", "quick", "slow"), lambda: None)
    first = {"ours": 5.0, "quick": 0.5, "slow": 9.0}  # ours was disturbed when it was checked
    times = measure.interleaved(steps, first, "ours", 1.0, CPU)
    assert {name: sorted(series) for name, series in times.items()} == {
        "ours": [0, 1],
        "quick": [0, 1],
        "slow": [-1],
    }
    assert (
        measure._relative(times["slow"], {0: 3.0, 1: 1.0, 2: 2.0}, layers=1, our_layers=2)["round_ratio"]
        == 9.0
    )


def test_the_results_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decompose, "CASES", {"vit-b": TOY})
    monkeypatch.setitem(predict.MODES, "accurate", (4, 8))
    assert decompose.main(["--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "vit-b.json").read_text())
    assert (results["format"], results["format_version"]) == ("mingle-decompose", 1)
    assert {
        "date",
        "device",
        "versions",
        "commit",
        "seed",
        "seconds",
        "method",
        "targets",
        "prediction",
    } <= results.keys()
    assert results["case"]["layers"] == 5 and "k^-½" in results["case"]["spectrum"]
    for part, ours in (("decompose", ACCURATE), ("project", OURS)):
        assert [(shape["shape"]["count"], shape["timed_layers"]) for shape in results[part]] == [
            (3, 1),
            (2, 1),
        ]
        by_hand = sum(shape["shape"]["count"] * shape["peers"][ours]["median"] for shape in results[part])
        assert results["totals"][part][ours]["median_seconds"] == pytest.approx(by_hand)
        assert results["totals"][part][ours]["ratio"] == pytest.approx(1)
    assert [(target["peer"], target["ratio"]) for target in results["targets"]] == [
        (PUBLISHED, 3.0),
        (THIN, 1.6),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"vit-b.json", "curves-vit-b.png", "task-vit-b.png"}
    printed = capsys.readouterr().out
    assert "all layers" in printed and "H100" in printed and "target vit-b" in printed
    show.write(results)
    assert plots.write_plots(results, tmp_path)


def test_totals_leave_out_peers_that_lack_a_shape():
    def peer(seconds, ratio):
        errors = {"excess": 1e-7}
        return dict(
            median=seconds,
            p20=seconds,
            p80=seconds,
            errors=errors,
            round_ratio=ratio,
            round_ratio_p20=ratio,
            round_ratio_p80=ratio,
        )

    shapes = [
        {"shape": {"m": 4, "n": 4, "count": 3}, "peers": {"a": peer(1.0, 1.0), "b": peer(2.0, 2.0)}},
        {"shape": {"m": 8, "n": 4, "count": 1}, "peers": {"a": peer(5.0, 1.0), "b": {"status": "wrong"}}},
    ]
    found = judge.totals(shapes, "a")
    assert found["a"]["median_seconds"] == 8.0 and found["b"] == {"missing": ["8×4"]}
    shapes[1]["peers"]["b"] = peer(30.0, 6.0)
    assert judge.totals(shapes, "a")["b"]["ratio"] == pytest.approx(36 / 8)


def test_a_target_is_met_by_exact_results_only():
    def results(excess, ratio=3.5):
        totals = {
            OURS: {"ratio": 1.0, "worst_excess": excess},
            PUBLISHED: {"ratio": ratio, "worst_excess": 0.0},
        }
        return {
            "case": {"name": "vit-b"},
            "device": {"type": "cpu"},
            "totals": {"project": totals, "decompose": {}},
        }

    assert [target["met"] for target in judge.targets(results(1e-6))] == [True]
    assert [target["met"] for target in judge.targets(results(1e-4))] == [False]
    assert [target["met"] for target in judge.targets(results(1e-6, 2.9))] == [False]


# --- the prediction ---


def test_floors_by_hand():
    hardware = predict.Hardware(
        fp32=1e12, fp64=5e11, bytes=1e9, launch=1e-6, multiprocessors=4, fp64_block=1e9
    )
    assert predict.Step("", launches=3).floor(hardware) == pytest.approx(3e-6)
    assert predict.Step("", 1, bytes=1e6).floor(hardware) == pytest.approx(1e-3)
    assert predict.Step("", 1, fp32=1e10, fp64=1e10).floor(hardware) == pytest.approx(0.03)
    assert predict.Step("", 1, block=1e6, matrices=5).floor(hardware) == pytest.approx(
        2e-3
    )  # two waves of four blocks
    assert predict._product("", 3, 2, 5, 7, 4) == predict.Step(
        "", 1, bytes=4 * 3 * (10 + 35 + 14), fp32=2 * 3 * 2 * 5 * 7
    )
    both = predict.Step("a", 1, fp64=2.0) + predict.Step("b", 2, fp64=3.0, block=4.0, matrices=5)
    assert both.times(2) == predict.Step("a", 6, fp64=10.0, block=8.0, matrices=5)
    estimate = predict.predict(CASES["vit-b"], hardware)["project"]["library_estimate_seconds"]
    assert estimate == pytest.approx(72 * 448 * 25e-6)


def test_the_whole_prediction_of_a_tiny_case_by_hand(monkeypatch):
    """One layer [100, 40], rank 2, ℓ = 4, q = 8: in fp32 the Gram matrix, and a product and a basis change
    per iteration.
    """
    monkeypatch.setitem(predict.MODES, "tiny", (2, 8))
    steps = predict.decompose(Shape(40, 100, 1), 2, "tiny")
    fp32 = 2 * 100 * 40 * 40 + 8 * (2 * 4 * 40 * 40 + 2 * 4 * 4 * 40)
    assert sum(step.fp32 for step in steps) == fp32
    fp64 = 8 * 2 * 4 * 4 * 40  # Gram matrices of the iteration
    fp64 += (
        2 * (2 * 4 * 40 * 100) + 6 * 2 * (2 * 4 * 4 * 100) + 2 * 4 * 4 * 40
    )  # P M, Q M; six rounds; the Gram matrix of C
    fp64 += (
        2 * 2 * 4 * (100 + 40) + 6 * 2 * (2 * 2 * 2 * 40) + 2 * 2 * 2 * (100 + 40)
    )  # triplets, unit images, verification
    assert sum(step.fp64 for step in steps) == fp64


class Counted(TorchDispatchMode):
    """Operations of products by dtype, and calls of anything that launches: no views, nor what only a CPU
    does to look at a defect.
    """

    NO_LAUNCH = ("_unsafe_view", "empty", "new_empty", "full", "le", "all", "_local_scalar_dense")

    def __init__(self):
        super().__init__()
        self.flop = {torch.float32: 0.0, torch.float64: 0.0}
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name()
        if name in ("aten::bmm", "aten::mm"):
            self.flop[result.dtype] += 2.0 * result.numel() * args[0].shape[-1]
        aliases = [returned.alias_info for returned in function._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in aliases)
        self.launches += not views and name.split("::")[1].split(".")[0] not in self.NO_LAUNCH
        return result


@pytest.mark.parametrize("shape", [Shape(96, 72, 3), Shape(200, 72, 3), Shape(72, 200, 3)])
def test_the_prediction_counts_what_the_code_does(shape, monkeypatch):
    """As on a GPU: in a batch, and without looking whether one round of Cholesky QR was enough."""
    monkeypatch.setattr(basis, "defect", lambda rows: torch.full(rows.shape[:-2], torch.inf))
    monkeypatch.setitem(predict.MODES, "toy", (8, 3))
    steps = predict.decompose(shape, 8, "toy")
    M = torch.randn(shape.count, shape.m, shape.n)
    plan = svd._Iteration(8, 16, 3, 0)
    with Counted() as counted:
        svd._leading(M, M.double(), plan, ["a", "b", "c"])
    inside = [
        step
        for step in steps
        if step.name not in ("stack, scale, widen", "verify", "scale back, narrow, signs")
        and "A = Σ" not in step.name
    ]
    assert sum(step.fp32 for step in inside) == counted.flop[torch.float32]
    assert sum(step.fp64 for step in inside) == counted.flop[torch.float64]
    assert sum(step.launches for step in inside) == pytest.approx(counted.launches, rel=0.05)


def test_the_prediction_of_projections_counts_what_the_code_does():
    shape, rank, earlier = Shape(80, 60, 2), 4, 3
    steps = predict.project(shape, rank, earlier)
    B, A = torch.randn(2, 80, 12), torch.randn(2, 12, 60)
    with Counted() as counted:
        experts.project_out_experts(torch.randn(2, 80, 60), B, A)
    assert sum(step.fp32 for step in steps) == counted.flop[torch.float32]
    products = sum(step.fp64 for step in steps if "Cholesky" not in step.name)
    assert products == counted.flop[torch.float64]
    with pytest.raises(ValueError, match="after 12 experts"):
        predict.project(shape, rank, 12)
