"""From layers to a task, and from a task to the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mingle.bench.decomposition.peers import ACCURATE, EXACT, OURS
from mingle.bench.decomposition.pipelines import PUBLISHED, THIN


@dataclass(frozen=True)
class Target:
    """On this device a peer should take at least `ratio` times as long as ours; for the whole task, or for
    one shape of it.
    """

    case: str
    part: str  # "decompose" or "project"
    peer: str
    ratio: float
    shape: str | None = None
    device: str = "cpu"

    @property
    def ours(self) -> str:
        return OURS if self.part == "project" else ACCURATE


# fmt: off
TARGETS = (
    Target("vit-b", "project", PUBLISHED, 3.0),
    Target("vit-b", "project", THIN, 1.6),
    Target("llm", "decompose", "torch.linalg.svd thin", 15.0, "4096×4096"),
    Target("vit-b", "project", PUBLISHED, 100.0, device="cuda"),
    Target("vit-b", "decompose", "torch.svd_lowrank 128/8", 10.0, device="cuda"),
)
# fmt: on


def totals(shapes: Sequence[Mapping[str, Any]], ours: str) -> dict[str, dict[str, Any]]:
    """By peer the seconds of all layers together, as the sum over shapes of the measured seconds per layer
    times the count of layers.

    Percentiles are the sums of the shapes' percentiles, wider than those of a whole task; ratios to ours are
    weighted with our time.  A peer that is missing for a shape, or wrong, has ``missing`` instead.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for measured in shapes for name in measured["peers"]):
        rows = [
            (measured["shape"], measured["peers"].get(name, {}), measured["peers"].get(ours, {}))
            for measured in shapes
        ]
        if missing := [f"{shape['m']}×{shape['n']}" for shape, peer, _ in rows if "median" not in peer]:
            found[name] = {"missing": missing}
            continue
        found[name] = {
            f"{key}_seconds": sum(shape["count"] * peer[key] for shape, peer, _ in rows)
            for key in ("median", "p20", "p80")
        }
        found[name]["worst_excess"] = max(peer["errors"]["excess"] for _, peer, _ in rows)
        if all("median" in own for _, _, own in rows):
            weights = [shape["count"] * own["median"] for shape, _, own in rows]
            for key in ("round_ratio", "round_ratio_p20", "round_ratio_p80"):
                weighted = sum(weight * peer[key] for weight, (_, peer, _) in zip(weights, rows, strict=True))
                found[name][key.removeprefix("round_")] = weighted / sum(weights)
    return found


def targets(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the targets of this case ask for and what was found; one whose peer has no time is left out.

    Met is a ratio only where our residual is within 1 + 1e-5 of the best.
    """
    judged = []
    for target in TARGETS:
        if (target.case, target.device) != (results["case"]["name"], results["device"]["type"]):
            continue
        peers = results["totals"][target.part]
        if target.shape:
            measured = next(one for one in results[target.part] if _name(one) == target.shape)
            peers = {
                name: {"ratio": peer["round_ratio"], "worst_excess": peer["errors"]["excess"]}
                for name, peer in measured["peers"].items()
                if "round_ratio" in peer
            }
        if "ratio" not in peers.get(target.peer, {}) or "ratio" not in peers.get(target.ours, {}):
            continue
        ratio, excess = peers[target.peer]["ratio"], peers[target.ours]["worst_excess"]
        met = ratio >= target.ratio and excess <= EXACT
        judged.append(asdict(target) | {"ours": target.ours, "found": ratio, "excess": excess, "met": met})
    return judged


def _name(measured: Mapping[str, Any]) -> str:
    return f"{measured['shape']['m']}×{measured['shape']['n']}"
