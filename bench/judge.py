"""Results judged: against the targets, and against earlier results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mingle.bench.peers import OURS
from mingle.bench.registry import TARGETS

#: a ratio to a peer that falls below this part of what it was is a regression
LIMIT = 1 / 1.10


def targets(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the targets of these cases ask for and what was found; a target whose peer has no time is left
    out.
    """
    peers = {case["case"]["name"]: case["peers"] for case in cases}
    judged = []
    for target in TARGETS:
        theirs, own = (
            peers.get(target.case, {}).get(name, {}).get("round_ratio") for name in (target.peer, target.ours)
        )
        if theirs is not None and own is not None:
            judged.append(asdict(target) | {"found": theirs / own, "met": theirs / own >= target.ratio})
    return judged


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Where we became slower relative to a peer, or stopped being right, in the cases that both results hold.

    Ratios within a round compare runs on a machine whose speed varies better than times do.  Our own explicit
    backends are no yardstick: the library's changes move them as well.
    """
    found = []
    earlier = {case["case"]["name"]: case["peers"] for case in old["cases"]}
    for case in new["cases"]:
        name, now = case["case"]["name"], case["peers"]
        before = earlier.get(name, {})
        if before.get(OURS, {}).get("status") == "ok" and now[OURS]["status"] != "ok":
            found.append(f"{name}: {OURS} is {now[OURS]['status']}, it was ok")
        for peer in before.keys() & now.keys():
            was, is_now = before[peer].get("round_ratio"), now[peer].get("round_ratio")
            if was and is_now and not peer.startswith(OURS) and is_now / was < LIMIT:
                found.append(
                    f"{name}: {peer} takes {is_now:.2f}× our time, it took {was:.2f}× ({is_now / was - 1:+.0%})"
                )
    return sorted(found)
