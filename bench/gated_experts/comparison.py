"""One case, all peers, and what their times mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch

from mingle.bench import judge
from mingle.bench.gated_experts import check, floor, inputs
from mingle.bench.gated_experts.cases import KernelCase
from mingle.bench.gated_experts.floor import Ceilings
from mingle.bench.gated_experts.peer import KernelPeer
from mingle.bench.gated_experts.peers import STRATEGIES
from mingle.bench.measure import OURS, Contestant, Rounds, Row, Run, compare, verdict
from mingle.bench.results import CaseResult, case_result

#: `backend="auto"` should be within this factor of the best strategy
DISPATCH_LIMIT = 1.10


def measure(
    case: KernelCase,
    peers: Sequence[KernelPeer],
    device: torch.device,
    limits: Ceilings,
    seconds: float,
    seed: int = 0,
) -> CaseResult:
    """Everything about one case; `seconds` bounds the time of the timing rounds."""
    case_inputs = inputs.make(case, device, seed)
    oracle = check.Oracle(case_inputs)

    def prepare(peer: KernelPeer) -> tuple[Run, Row]:
        adapted = peer.adapt(case_inputs)
        run = peer.build(adapted)
        if not peer.same(adapted.case):
            run()
            return run, {"status": "bound", "errors": None}
        own = oracle if adapted is case_inputs else check.Oracle(adapted)
        return run, verdict(own.errors(run), check.tolerance(adapted.x.dtype, device))

    def contestant(peer: KernelPeer) -> Contestant:
        return Contestant(peer.name, partial(prepare, peer), {"note": peer.note}, memory=not peer.captured)

    rows, others = compare(list(map(contestant, peers)), device, Rounds(seconds, flush=True), seed)
    least, bound = floor.floor(case, limits)
    for row in rows:
        if "median" in row and row["status"] == "ok":  # bounds do less work
            row["floor_fraction"] = least / row["median"]
    found = case_result(case.name, case.title, asdict(case), rows, cpus_used_by_others=others)
    strategies = [name for name in STRATEGIES if name != OURS]
    choice = judge.choice(judge.by_name(found), strategies, DISPATCH_LIMIT)
    lower = {"count": asdict(floor.count(case)), "floor": {"seconds": least, "bound": bound}}
    return found | lower | {"dispatch": choice}


def dispatch_remarks(cases: Sequence[CaseResult]) -> list[str]:
    """How often `backend="auto"` chose well, and where it did not."""
    judged = {case["name"]: case["dispatch"] for case in cases if case["dispatch"]}
    bad = {name: choice for name, choice in judged.items() if not choice["within_limit"]}
    good = f"in {len(judged) - len(bad)} of {len(judged)} cases"
    slower = [
        f"{name}: {choice['auto_over_best']:.2f}× the time of {choice['best']}"
        for name, choice in bad.items()
    ]
    return [f'backend="auto" is within 10 % of the best strategy {good}', *slower]
