"""Where the time of a case goes on a CPU: every product against the best rate seen in the run, the passes
between the products, and what follows for any implementation that has to make the same products.

    python bench/run.py --breakdown
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mingle.bench import floor, inputs, measure
from mingle.bench.inputs import Inputs
from mingle.bench.peers import OURS, PEERS, Unavailable
from mingle.bench.registry import Case
from mingle.kernels import gemm
from mingle.kernels.gated_experts import grouped
from mingle.ops.dispatch import folding_pays

#: whole layers, beside which the parts stand
OWN, MERGES = (OURS, "mingle prepacked"), ("per-sample merge", "dense merge")


@dataclass(frozen=True)
class Part:
    """One product, whose operations are counted, or one pass over memory, which counts none; `form` says of
    which way to compute.
    """

    form: str
    name: str
    run: Callable[[], object]
    flop: float = 0.0


def parts(t: Inputs) -> Iterator[Part]:
    """What the grouped backend does for the case, piece by piece, with the library's own functions."""
    case, (gate_weight, gate_bias) = t.case, t.all_gates()
    x, A, up, W = t.x.flatten(0, 1), t.A.flatten(0, 1), t.B.mT.flatten(0, 1), t.weight
    (rows, width), outputs, ranks, group = x.shape, case.d_out, len(A), case.rows // case.groups
    z, _ = grouped.pooled_gates(x, gate_weight, gate_bias, None, group)
    base = 2.0 * rows * width * outputs
    if case.groups == 1 and folding_pays(rows, width, outputs):
        gated, folded = (t.B * z[0].to(W.dtype).view(-1, 1, 1)).mT.flatten(0, 1).mT, W.clone()
        yield Part("folded", "gates", lambda: grouped.pooled_gates(x, gate_weight, gate_bias, None, group))
        yield Part("folded", "z ⊙ B", lambda: t.B * z[0].to(W.dtype).view(-1, 1, 1))
        yield Part(
            "folded", "(z ⊙ B_cat) A_cat", lambda: gemm.linear(gated, A.mT), 2.0 * outputs * width * ranks
        )
        yield Part("folded", "+ W₀", lambda: folded.add_(W))
        yield Part("folded", "x W_effᵀ + b", lambda: gemm.linear(x, W, t.bias), base)
        return
    hidden, y = gemm.linear(x, A), gemm.linear(x, W, t.bias)
    down, added = 2.0 * rows * width * ranks, 2.0 * rows * ranks * outputs
    yield Part("low-rank", "gates", lambda: grouped.pooled_gates(x, gate_weight, gate_bias, None, group))
    yield Part("low-rank", "x A_catᵀ", lambda: gemm.linear(x, A), down)
    yield Part("low-rank", "z ⊙ H", lambda: grouped.gate(hidden, z, group))
    yield Part("low-rank", "x W₀ᵀ + b", lambda: gemm.linear(x, W, t.bias), base)
    yield Part("low-rank", "y + (z ⊙ H) B_cat", lambda: gemm.linear(hidden, up.mT, onto=y), added)
    if not gemm.packing_pays(x, outputs):
        return
    packed_down, packed = gemm.pack(A), gemm.pack(torch.cat([W, up.mT], 1))
    joined = torch.cat([x, hidden], 1)
    yield Part("prepacked", "gates", lambda: grouped.pooled_gates(x, gate_weight, gate_bias, None, group))
    yield Part("prepacked", "x A_catᵀ", lambda: gemm.linear_packed(x, packed_down), down)
    yield Part("prepacked", "[x | …]", lambda: joined[:, :width].copy_(x))
    yield Part("prepacked", "[… | z ⊙ H]", lambda: grouped.gate(hidden, z, group, out=joined[:, width:]))
    yield Part(
        "prepacked",
        "[x | z ⊙ H] [W₀ | B_cat]ᵀ + b",
        lambda: gemm.linear_packed(joined, packed, t.bias),
        base + added,
    )


def measured(case: Case, seconds: float, seed: int = 0) -> dict[str, Any]:
    """The parts of a forward case and some whole layers, timed in turns, as plain data."""
    device = torch.device("cpu")
    t = inputs.make(case, device, seed)
    with torch.no_grad():
        pieces = list(parts(t))
        steps: dict[str, Callable[[], Any]] = {f"{part.form}: {part.name}": part.run for part in pieces}
        for name in (*OWN, *MERGES):
            try:
                steps[name] = PEERS[name].build(t)
            except Unavailable:
                continue
        times = measure.interleaved(steps, device, seconds, seed)
    summaries = {
        name: {key: value for key, value in measure.summary(series).items() if key != "seconds"}
        for name, series in times.items()
    }
    large = floor.ceilings([case.dtype], device).flop_per_second[case.dtype]
    found = [asdict(part) | summaries[f"{part.form}: {part.name}"] for part in pieces]
    for part in found:
        del part["run"]
    best = max(large, *(part["flop"] / part["median"] for part in found))
    wholes = {name: summaries[name] for name in (*OWN, *MERGES) if name in summaries}
    return {
        "case": asdict(case),
        "large_product_flop_per_second": large,
        "best_flop_per_second": best,
        "parts": found,
        "wholes": wholes,
        "limits": [limit(form, found, wholes, best) for form in dict.fromkeys(part.form for part in pieces)],
    }


def limit(
    form: str, found: Sequence[Mapping[str, Any]], wholes: Mapping[str, Mapping[str, Any]], best: float
) -> dict[str, Any]:
    """How many times as long the merges take as a form's parts, as its products alone, and as these at the
    best rate of the run.
    """
    own = [part for part in found if part["form"] == form]
    seconds = {
        "parts": sum(part["median"] for part in own),
        "products": sum(part["median"] for part in own if part["flop"]),
        "products at the best rate": sum(part["flop"] for part in own) / best,
    }
    ratios = {
        name: {what: wholes[name]["median"] / taken for what, taken in seconds.items()}
        for name in MERGES
        if name in wholes
    }
    return {"form": form, "seconds": seconds, "ratios": ratios}
