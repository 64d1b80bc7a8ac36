"""From seconds to ratios, and from ratios to the targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mingle.bench import machine
from mingle.bench.endtoend.contenders import BF16, OURS, PUBLISHED

#: points of accuracy by which bf16 products may lower a merge and still count as unchanged
DROP = 0.5


@dataclass(frozen=True)
class Target:
    """On this device `peer` should take at least `ratio` times as long as `ours`: for the whole merge, or for
    one stage of it.
    """

    case: str
    tasks: int
    part: str
    ratio: float
    ours: str = OURS
    peer: str = PUBLISHED
    device: str = "cpu"


TARGETS = tuple(
    Target(case, 8, *what)
    for case in ("glyphs8", "vit-b-32")
    for what in (("whole", 3.0), ("adapt", 2.5, OURS), ("adapt", 4.0, BF16))
) + tuple(Target(case, tasks, "whole", 20.0, device="cuda") for case, tasks in (("vit-b-32", 8), ("vit-l-14", 20)))  # fmt: skip


def ratios(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By one of ours and by peer: its seconds over ours, for the whole merge and for every stage.

    Where there were rounds, the median of the rounds' ratios, with ``whole_spread`` and ``adapt_spread``, the
    smallest and largest.
    """
    timed = {name: result for name, result in found.items() if "stages" in result}
    return {
        ours: {peer: _ratios(timed[ours], timed[peer]) for peer in timed if peer != ours}
        for ours in (OURS, BF16)
        if ours in timed
    }


def _ratios(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, Any]:
    pairs = list(zip(_rounds(ours), _rounds(peer), strict=True))
    parts = [part for part in ("whole", *ours["stages"]) if pairs[0][0].get(part)]
    series = {part: [there[part] / here[part] for here, there in pairs] for part in parts}
    found: dict[str, Any] = {part: statistics.median(values) for part, values in series.items()}
    if len(pairs) > 1:
        found |= {f"{part}_spread": [min(series[part]), max(series[part])] for part in ("whole", "adapt")}
    return found


def _rounds(result: Mapping[str, Any]) -> list[dict[str, float]]:
    if "rounds" in result:
        return [dict(run["stages"]) | {"whole": run["wall_seconds"]} for run in result["rounds"]]
    return [dict(result["stages"]) | {"whole": result["whole_seconds"]}]


def targets(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the targets of this case ask for and what was found; those whose contenders have no times are left
    out.

    With bf16 products the ratio counts only where accuracy, if there is one, is unchanged; and none does
    where other processes disturbed.
    """
    judged = []
    case, device = results["case"], results["device"]["type"]
    for target in TARGETS:
        if (target.case, target.tasks, target.device) != (case["name"], case["tasks"], device) or results[
            "quick"
        ]:
            continue
        found = results["ratios"].get(target.ours, {}).get(target.peer, {}).get(target.part)
        if found is None:
            continue
        here, first, there = (results["contenders"][name] for name in (target.ours, OURS, target.peer))
        known = here.get("accuracy") is not None and first.get("accuracy") is not None
        drop = first["accuracy"] - here["accuracy"] if known else None
        disturbed = any((one.get("cpus_used_by_others") or 0.0) > machine.MUCH for one in (here, there))
        met = found >= target.ratio and (drop or 0.0) <= DROP and not disturbed
        judged.append(
            asdict(target) | {"found": found, "accuracy_drop": drop, "disturbed": disturbed, "met": met}
        )
    return judged
