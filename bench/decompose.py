"""What making a task's experts costs, beside LAPACK and torch.svd_lowrank: ``python bench/decompose.py``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from mingle.bench import command, record
from mingle.bench.decomposition import cases, check
from mingle.bench.decomposition.cases import ACCURATE, CASES, ExpertCase, ExpertProblem
from mingle.bench.decomposition.check import Optima
from mingle.bench.decomposition.peers import ExpertPeer, peers, pipelines
from mingle.bench.judge import by_name
from mingle.bench.measure import OURS, SLOW, Contestant, Rounds, Row, Run, compare, log, timed, verdict
from mingle.bench.record import CaseResult, Results, case_result

#: seconds of timing per peer and shape, and on a GPU of a case after which no further peer is begun
_SECONDS, _QUICK_SECONDS, _GPU_CASE_SECONDS = 1.0, 0.4, 80.0
_METHOD = (
    "seconds of a task: the sum over shapes of the seconds per layer, measured on `timed_layers` of them, "
    "times the count of layers"
)


@dataclass(frozen=True)
class Budget:
    """Seconds of timing per peer, and the moment of `time.monotonic` from which no further peer is begun."""

    seconds: float
    until: float = math.inf


def decompositions(
    problem: ExpertProblem, peers: Sequence[ExpertPeer], budget: Budget, seed: int = 0
) -> CaseResult:
    """Every peer on the problem's Δ."""
    return _compared(
        "decompose", problem, peers, check.decomposition_errors, check.optima(problem), budget, seed
    )


def projections(
    problem: ExpertProblem, peers: Sequence[ExpertPeer], budget: Budget, seed: int = 0
) -> CaseResult:
    """Every peer from the problem's Δ and earlier experts to new experts."""
    optima, ranks = check.projected_optima(problem)
    found = _compared("project", problem, peers, check.expert_errors, optima, budget, seed)
    return found | {"effective_ranks": ranks}


def _compared(
    part: str,
    problem: ExpertProblem,
    peers: Sequence[ExpertPeer],
    errors: Callable[[Any, Optima], dict[str, float]],
    optima: Optima,
    budget: Budget,
    seed: int,
) -> CaseResult:
    """Seconds are per layer; ``layers`` of a row says of how many in one call.  The first peer is ours."""
    device = problem.deltas.device

    def prepare(peer: ExpertPeer, own: ExpertProblem) -> tuple[Run | None, Row]:
        late = "no time was left for it" if time.monotonic() > budget.until else None
        if reason := peer.left_out(problem.shape) or late:
            return None, {"status": "left out", "reason": reason}
        run = partial(peer.run, own)
        seconds, output = timed(run, device)
        if seconds < SLOW or peer is peers[0]:
            seconds, output = timed(run, device)  # without what only the first call does
        limits = check.OUR_LIMITS if peer.name.startswith(OURS) else check.LIMITS
        seen = {i: optimum for i, optimum in optima.items() if i < own.layers}
        row = verdict(errors(output, seen), peer.limit, limits if part == "decompose" else {})
        return run, row | ({"first_seconds": seconds} if row["status"] == "ok" else {})

    def contestant(peer: ExpertPeer) -> Contestant:
        own = problem if peer.batched else problem.first()
        facts = {"telling": peer.telling, "layers": own.layers, **peer.facts}
        return Contestant(peer.name, partial(prepare, peer, own), facts, own.layers)

    contestants = list(map(contestant, peers))
    rows, others = compare(contestants, device, Rounds(each=budget.seconds, warm_ups=0), seed, peers[0].name)
    shape = problem.shape
    facts = {"part": part, "shape": asdict(shape), "timed_layers": problem.layers}
    title = f"{part} {shape.name}, {shape.count} layers"
    return case_result(f"{part} {shape.name}", title, facts, rows, cpus_used_by_others=others)


def whole(case: ExpertCase, part: str, shapes: Sequence[CaseResult], ours: str) -> CaseResult:
    """All layers together: the sum over shapes of the measured seconds per layer times the count of layers.

    Percentiles are the sums of the shapes', wider than those of a whole task; ratios to ours are weighted
    with our time.  A row that is missing for a shape, or wrong, is ``left out``.
    """
    counts, named = [one["facts"]["shape"]["count"] for one in shapes], [by_name(one) for one in shapes]
    own, rows = [here.get(ours, {}).get("median") for here in named], []
    for first in shapes[0]["rows"]:
        row: Row = {key: first[key] for key in ("name", "telling", "note") if key in first}
        found = [here.get(row["name"], {}) for here in named]
        rows.append(row)
        if missing := [one["name"] for one, peer in zip(shapes, found, strict=True) if "median" not in peer]:
            row |= {"status": "left out", "reason": f"no time of {', '.join(missing)}"}
            continue
        row |= {"status": "ok", "errors": {"excess": max(peer["errors"]["excess"] for peer in found)}}
        for key in ("median", "p20", "p80"):
            row[key] = sum(n * peer[key] for n, peer in zip(counts, found, strict=True))
        for key in ("round_ratio", "round_ratio_p20", "round_ratio_p80") if all(own) else ():
            weights = [n * taken for n, taken in zip(counts, own, strict=True)]
            row[key] = sum(w * peer[key] for w, peer in zip(weights, found, strict=True)) / sum(weights)
    title = f"{part}: {case.title}, {case.layers} layers, after {case.earlier} tasks"
    return case_result(f"{case.name} {part}", title, {"part": part, "shape": None}, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases asked for.  Returns 0, or 1 where a result of ours was wrong or failed."""
    parser = command.parser("Time the decompositions behind a task's experts, each checked against LAPACK.")
    models = "the layers of which model; all take ten minutes on a CPU"
    parser.add_argument("--case", choices=[*CASES, "all"], default="all", help=models)
    parser.add_argument("--quick", action="store_true", help="the layers of a ViT-B only, in two minutes")
    args = command.begin(parser, arguments)
    if args.quick and args.case not in ("all", "vit-b"):
        parser.error(f"--quick measures vit-b, not {args.case}")
    chosen = ["vit-b"] if args.quick else list(CASES) if args.case == "all" else [args.case]
    seconds = _QUICK_SECONDS if args.quick else _SECONDS
    found = ((name, run(CASES[name], args.device, seconds, args.seed)) for name in chosen)
    return max([command.finish(one, args.out, name) for name, one in found])


def run(case: ExpertCase, device: torch.device, seconds: float, seed: int = 0) -> Results:
    """Both parts of one case, shape by shape and for the whole task."""
    began = time.monotonic()
    budget = Budget(seconds, began + _GPU_CASE_SECONDS if device.type == "cuda" else float("inf"))
    decomposed, projected = [], []
    for shape in case.shapes:
        log.info("%s: %s", case.name, shape.name)
        problem = cases.make(case, shape, shape.count if device.type == "cuda" else 1, device, seed)
        decomposed.append(decompositions(problem, peers(device), budget, seed))
        projected.append(projections(problem, pipelines(device), budget, seed))
    sums = whole(case, "decompose", decomposed, ACCURATE), whole(case, "project", projected, OURS)
    model = asdict(case) | {"layers": case.layers, "spectrum": cases.SPECTRUM}
    found = [*decomposed, *projected, *sums]
    return record.envelope("experts", device, seed, found, cases.TARGETS, began, model=model, method=_METHOD)


if __name__ == "__main__":
    raise SystemExit(main())
