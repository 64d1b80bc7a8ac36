"""Results judged: against the targets, and against earlier results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mingle.bench.machine import MUCH
from mingle.bench.measure import OURS, Row

#: a ratio to another row that falls below this part of what it was is a regression
REGRESSION = 1 / 1.10
#: points of accuracy by which a row may fall behind `OURS` and still count as unchanged
DROP = 0.5


@dataclass(frozen=True)
class Target:
    """In `case` `peer` should take at least `ratio` times as long as `ours`, as a whole or in one `stage`.

    It counts on a `device` of that type, and is met only where the first of our errors is at most `error`,
    accuracy is unchanged, and no other processes disturbed either row.
    """

    case: str
    peer: str
    ratio: float
    ours: str = OURS
    stage: str | None = None
    device: str | None = None
    error: float | None = None


def by_name(case: Mapping[str, Any]) -> dict[str, Row]:
    return {row["name"]: row for row in case["rows"]}


def targets(cases: Iterable[Mapping[str, Any]], asked: Iterable[Target], device: str) -> list[dict[str, Any]]:
    """What the targets of these cases ask for and what was found; left out where rows have no times."""
    rows, judged = {case["name"]: by_name(case) for case in cases}, []
    for target in asked:
        here = rows.get(target.case, {})
        own, peer = here.get(target.ours, {}), here.get(target.peer, {})
        parts = (row.get("stages", {}).get(target.stage, {}) if target.stage else row for row in (peer, own))
        found = _ratio(*parts)
        if found is None or target.device not in (None, device):
            continue
        verdict: dict[str, Any] = {"found": found}
        met = found >= target.ratio
        if target.error is not None:
            verdict["found_error"] = next(iter(own["errors"].values()))
            met &= verdict["found_error"] <= target.error
        if "accuracy" in own and "accuracy" in here.get(OURS, {}):
            verdict["accuracy_drop"] = here[OURS]["accuracy"] - own["accuracy"]
            met &= verdict["accuracy_drop"] <= DROP
        verdict["disturbed"] = any((row.get("cpus_used_by_others") or 0.0) > MUCH for row in (own, peer))
        judged.append(asdict(target) | verdict | {"met": met and not verdict["disturbed"]})
    return judged


def _ratio(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> float | None:
    """The median over common rounds, or by way of both ratios to ours; None where there are no times."""
    there, here = theirs.get("seconds", ()), own.get("seconds", ())
    if there and len(there) == len(here) and all(here):
        return statistics.median(a / b for a, b in zip(there, here, strict=True))
    known = "round_ratio" in theirs and "round_ratio" in own
    return theirs["round_ratio"] / own["round_ratio"] if known else None


def regressions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where we became slower relative to a peer, or stopped being right, in the cases that both results hold.

    Ratios within a round hold where the machine's speed varies.  Other forms of ours are no yardstick.
    """
    found, earlier = [], {case["name"]: by_name(case) for case in old["cases"]}
    for case in new["cases"]:
        name, now, before = case["name"], by_name(case), earlier.get(case["name"], {})
        if before.get(OURS, {}).get("status") == "ok" and now[OURS]["status"] != "ok":
            found.append(f"{name}: {OURS} is {now[OURS]['status']}, it was ok")
        for peer in before.keys() & now.keys():
            was, is_now = before[peer].get("round_ratio"), now[peer].get("round_ratio")
            if was and is_now and not peer.startswith(OURS) and is_now / was < REGRESSION:
                change = f"({is_now / was - 1:+.0%})"
                found.append(f"{name}: {peer} takes {is_now:.2f}× our time, it took {was:.2f}× {change}")
    return sorted(found)


def choice(rows: Mapping[str, Row], strategies: Sequence[str], limit: float) -> dict[str, Any] | None:
    """Whether `OURS` was within `limit` of the fastest strategy; None where there is nothing to compare."""
    timed = {name: rows[name]["round_ratio"] for name in strategies if "round_ratio" in rows.get(name, {})}
    if not timed:
        return None
    best = min(timed, key=timed.__getitem__)
    return {"best": best, "auto_over_best": 1 / timed[best], "within_limit": 1 / timed[best] <= limit}
