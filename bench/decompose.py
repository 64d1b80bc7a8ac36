"""What making a task's experts costs, beside LAPACK and torch.svd_lowrank: ``python bench/decompose.py``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from mingle.bench import command, record
from mingle.bench.decomposition import cases, check
from mingle.bench.decomposition.cases import ACCURATE, CASES, ExpertCase, ExpertProblem
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


def compared(
    part: str, problem: ExpertProblem, peers: Sequence[ExpertPeer], seconds: float, until: float = math.inf,
    seed: int = 0,
) -> CaseResult:  # fmt: skip
    """Every peer on the problem's Δ ("decompose"), or from Δ and earlier experts to new ones ("project").

    The first peer is ours.  Each is timed for that many seconds, and none is begun after `until`, a moment of
    `time.monotonic`.  Times are per layer; ``layers`` of a row says how many were done in one call.
    """
    more: dict[str, Any] = {}
    errors: Callable[[Any, check.Optima], dict[str, float]]
    if part == "decompose":
        errors, optima = check.decomposition_errors, check.optima(problem)
    else:
        errors, (optima, more["effective_ranks"]) = check.expert_errors, check.projected_optima(problem)
    device = problem.deltas.device

    def prepare(peer: ExpertPeer, own: ExpertProblem) -> tuple[Run | None, Row]:
        late = "no time was left for it" if time.monotonic() > until else None
        if reason := peer.left_out(problem.shape) or late:
            return None, {"status": "left out", "reason": reason}
        run = partial(peer.run, own)
        taken, output = timed(run, device)
        if taken < SLOW or peer is peers[0]:
            taken, output = timed(run, device)  # without what only the first call does
        limits = check.OUR_LIMITS if peer.name.startswith(OURS) else check.LIMITS
        seen = {i: optimum for i, optimum in optima.items() if i < own.layers}
        row = verdict(errors(output, seen), peer.limit, limits if part == "decompose" else {})
        return run, row | ({"first_seconds": taken} if row["status"] == "ok" else {})

    contestants = []
    for peer in peers:
        own = problem if peer.batched else problem.first()
        facts = {"telling": peer.telling, "layers": own.layers, **peer.facts}
        contestants.append(Contestant(peer.name, partial(prepare, peer, own), facts, own.layers))
    rows, others = compare(contestants, device, Rounds(each=seconds, warm_ups=0), seed, peers[0].name)
    shape = problem.shape
    about = {"part": part, "shape": asdict(shape), "timed_layers": problem.layers}
    title, more["cpus_used_by_others"] = f"{part} {shape.name}, {shape.count} layers", others
    return case_result(f"{part} {shape.name}", title, about, rows, **more)


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
    models = "the layers of which model; all take ten minutes on a CPU; --quick: vit-b, in two minutes"
    parser.add_argument("--case", choices=[*CASES, "all"], default="all", help=models)
    args = command.begin(parser, arguments)
    if args.quick and args.case not in ("all", "vit-b"):
        parser.error(f"--quick measures vit-b, not {args.case}")
    chosen = ["vit-b"] if args.quick else list(CASES) if args.case == "all" else [args.case]
    seconds = _QUICK_SECONDS if args.quick else _SECONDS
    found = ((name, run(CASES[name], args.device, seconds, args.seed)) for name in chosen)
    return max([command.finish(one, args.out, name) for name, one in found])


def run(case: ExpertCase, device: torch.device, seconds: float, seed: int = 0) -> Results:
    """Both parts of one case, shape by shape and for the whole task."""
    began, cuda = time.monotonic(), device.type == "cuda"
    until = began + _GPU_CASE_SECONDS if cuda else math.inf
    found: dict[str, list[CaseResult]] = {"decompose": [], "project": []}
    for shape in case.shapes:
        log.info("%s: %s", case.name, shape.name)
        problem = cases.make(case, shape, shape.count if cuda else 1, device, seed)
        for part, those in (("decompose", peers(device)), ("project", pipelines(device))):
            found[part].append(compared(part, problem, those, seconds, until, seed))
    sums = [
        whole(case, part, found[part], ours) for part, ours in (("decompose", ACCURATE), ("project", OURS))
    ]
    every = [*found["decompose"], *found["project"], *sums]
    model = asdict(case) | {"layers": case.layers, "spectrum": cases.SPECTRUM}
    return record.envelope("experts", device, seed, every, cases.TARGETS, began, model=model, method=_METHOD)


if __name__ == "__main__":
    raise SystemExit(main())
