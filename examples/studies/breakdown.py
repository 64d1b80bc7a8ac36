"""Where the time of a case goes on a CPU: every product against the best rate of the run, the passes between
them, and what follows for any implementation that has to make the same products.

    python examples/studies/breakdown.py --out breakdown.json
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import layer_study
import torch

from mingle.bench.gated_experts import cases, floor, inputs
from mingle.bench.gated_experts.cases import KernelCase
from mingle.bench.gated_experts.inputs import Inputs
from mingle.bench.gated_experts.peers import PEERS
from mingle.bench.measure import OURS, Contestant, Rounds, Row, Run, compare
from mingle.bench.record import CaseResult, case_result
from mingle.kernels import gemm
from mingle.kernels.gated_experts import grouped
from mingle.ops.dispatch import folding_pays

_NAMES = "square-sample-fp32", "square-sample-bf16", "square-batch-fp32", "vit-b32-batch-fp32"
CASES = tuple(cases.CASES[name] for name in _NAMES)
#: of timing, per case
SECONDS = 8.0
#: what the parts are held against
MERGES = ("per-sample merge", "dense merge")


@dataclass(frozen=True)
class Part:
    """One product, whose operations are counted, or one pass over memory, of one form of the computation."""

    form: str
    name: str
    run: Run
    flop: float = 0.0


def parts(t: Inputs) -> Iterator[Part]:
    """What the grouped backend does for the case, piece by piece, with the library's own functions."""
    case, (gate_weight, gate_bias) = t.case, t.all_gates()
    x, A, up, W = t.x.flatten(0, 1), t.A.flatten(0, 1), t.B.mT.flatten(0, 1), t.weight
    (rows, width), outputs, ranks, group = x.shape, case.d_out, len(A), case.rows // case.groups

    def gates() -> Any:
        return grouped.pooled_gates(x, gate_weight, gate_bias, None, group)

    z, _ = gates()
    base = 2.0 * rows * width * outputs
    if case.groups == 1 and folding_pays(rows, width, outputs, ranks, "cpu"):
        gated, product = t.A * z[0].to(W.dtype).view(-1, 1, 1), 2.0 * outputs * width * ranks
        yield Part("folded", "gates", gates)
        yield Part("folded", "z ⊙ A", lambda: t.A * z[0].to(W.dtype).view(-1, 1, 1))
        yield Part(
            "folded", "W₀ + B_cat (z ⊙ A_cat)", lambda: torch.addmm(W, up.mT, gated.flatten(0, 1)), product
        )
        yield Part("folded", "x W_effᵀ + b", lambda: gemm.linear(x, W, t.bias), base)
        return
    hidden, y = gemm.linear(x, A), gemm.linear(x, W, t.bias)
    down, added = 2.0 * rows * width * ranks, 2.0 * rows * ranks * outputs
    yield Part("low-rank", "gates", gates)
    yield Part("low-rank", "x A_catᵀ", lambda: gemm.linear(x, A), down)
    yield Part("low-rank", "z ⊙ H", lambda: grouped.gate(hidden, z, group))
    yield Part("low-rank", "x W₀ᵀ + b", lambda: gemm.linear(x, W, t.bias), base)
    yield Part("low-rank", "y + (z ⊙ H) B_cat", lambda: gemm.linear(hidden, up.mT, onto=y), added)
    if not gemm.packing_pays(x, outputs):
        return
    packed_down, packed = gemm.pack(A), gemm.pack(torch.cat([W, up.mT], 1))
    joined, name = torch.cat([x, hidden], 1), "[x | z ⊙ H] [W₀ | B_cat]ᵀ + b"
    yield Part("prepacked", "gates", gates)
    yield Part("prepacked", "x A_catᵀ", lambda: gemm.linear_packed(x, packed_down), down)
    yield Part("prepacked", "[x | …]", lambda: joined[:, :width].copy_(x))
    yield Part("prepacked", "[… | z ⊙ H]", lambda: grouped.gate(hidden, z, group, out=joined[:, width:]))
    yield Part("prepacked", name, lambda: gemm.linear_packed(joined, packed, t.bias), base + added)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure `CASES`, show what was found and write it."""
    return layer_study.run(
        arguments,
        "Where the time of a layer goes on a CPU, and what limits it.",
        "breakdown",
        CASES,
        partial(measure, seconds=SECONDS),
    )


def measure(case: KernelCase, seconds: float, seed: int = 0) -> CaseResult:
    """The parts of a forward case, rows with ``form`` and ``flop``, and some whole layers, timed in turns."""
    device = torch.device("cpu")
    t = inputs.make(case, device, seed)

    def ready(run: Run) -> tuple[Run, Row]:
        return run, {"status": "ok"}

    def built(name: str) -> tuple[Run, Row]:
        return ready(PEERS[name].build(t))

    with torch.no_grad():
        pieces = [(p, {"form": p.form, "flop": p.flop}) for p in parts(t)]
        those = [Contestant(f"{p.form}: {p.name}", partial(ready, p.run), facts) for p, facts in pieces]
        those += [Contestant(name, partial(built, name)) for name in (OURS, "mingle prepacked", *MERGES)]
        rows, others = compare(those, device, Rounds(seconds), seed)
    found = [row for row in rows if "form" in row]
    large = floor.ceilings([case.dtype], device).flop_per_second[case.dtype]
    best = max(large, *(row["flop"] / row["median"] for row in found))
    for row in found:
        row["best_fraction"] = row["flop"] / row["median"] / best
    merges = {row["name"]: row for row in rows if row["name"] in MERGES and "median" in row}
    limits = [limit(form, found, merges, best) for form in dict.fromkeys(row["form"] for row in found)]
    remarks = [f"best: {best / 1e9:.0f} GFLOP/s"]
    for form, merge, ratios in ((one["form"], *item) for one in limits for item in one["ratios"].items()):
        said = ", ".join(f"{parts} {ratio:.2f}×" for parts, ratio in ratios.items())
        remarks.append(f"{form}: {merge} over {said}")
    more = {"limits": limits, "remarks": remarks, "cpus_used_by_others": others}
    more |= {"large_product_flop_per_second": large, "best_flop_per_second": best}
    return case_result(case.name, case.title, asdict(case), rows, **more)


def limit(form: str, pieces: Sequence[Row], wholes: Mapping[str, Row], best: float) -> dict[str, Any]:
    """How many times as long the merges take as a form's parts, its products, and these at the best rate."""
    own = [row for row in pieces if row["form"] == form]
    products = [row for row in own if row["flop"]]
    seconds = {"parts": sum(row["median"] for row in own), "products": sum(row["median"] for row in products)}
    seconds["products at the best rate"] = sum(row["flop"] for row in products) / best
    ratios = {name: {k: whole["median"] / s for k, s in seconds.items()} for name, whole in wholes.items()}
    return {"form": form, "seconds": seconds, "ratios": ratios}


if __name__ == "__main__":
    raise SystemExit(main())
