"""The breakdown of a layer's time: its parts are the products of the case, and make the layer."""

from __future__ import annotations

import breakdown
import pytest
import torch

from mingle.bench import record
from mingle.bench.gated_experts import floor, inputs
from mingle.bench.gated_experts.cases import KernelCase
from mingle.bench.gated_experts.peers import PEERS
from mingle.bench.judge import by_name
from mingle.bench.measure import OURS
from mingle.kernels.gated_experts import reference

CPU = torch.device("cpu")
LIMITS = floor.Ceilings({"float32": 1e11, "bfloat16": 2e11, "float16": 1e11}, 1e10)


def tiny(reduce: str) -> KernelCase:
    """100 tokens: enough to fold, too few for a packed product."""
    return KernelCase("tiny", 20, 5, 48, 40, 4, rank=16, reduce=reduce)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reduce", "forms"), [("token", ["low-rank"]), ("sample", ["low-rank"]), ("batch", ["folded"])]
)
def test_a_breakdown_makes_the_products_of_the_case(monkeypatch, tmp_path, capsys, reduce, forms):
    case = tiny(reduce)
    monkeypatch.setattr(floor, "ceilings", lambda dtypes, device: LIMITS)
    monkeypatch.setattr(breakdown, "CASES", (case,))
    monkeypatch.setattr(breakdown, "SECONDS", 0.0)
    assert breakdown.main(["--out", str(tmp_path / "breakdown.json")]) == 0
    (found,) = record.read(tmp_path / "breakdown.json")["cases"]
    parts = [row for row in found["rows"] if "form" in row]
    assert list(dict.fromkeys(part["form"] for part in parts)) == forms
    work = floor.work(case)
    count = work.folded_forward_flop if reduce == "batch" else work.forward_flop
    assert sum(part["flop"] for part in parts) == pytest.approx(count, rel=0.03)
    assert all(0 < part["p20"] <= part["median"] <= part["p80"] for part in parts)
    assert "tiny" in capsys.readouterr().out
    for limit in found["limits"]:
        seconds = limit["seconds"]
        assert seconds["products at the best rate"] <= seconds["products"] <= seconds["parts"]
        assert limit["ratios"] or reduce == "token"
        for merge, ratios in limit["ratios"].items():
            assert ratios["parts"] == pytest.approx(by_name(found)[merge]["median"] / seconds["parts"])


@pytest.mark.parametrize("reduce", reference.REDUCTIONS)
def test_the_parts_of_a_breakdown_make_the_layer(monkeypatch, reduce):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    t = inputs.make(tiny(reduce), CPU)
    with torch.no_grad():
        pieces = {(part.form, part.name): part for part in breakdown.parts(t)}
        expected = PEERS[OURS].build(t)()["y"].flatten(0, 1)
        if reduce == "batch":
            merged = pieces["folded", "W₀ + B_cat (z ⊙ A_cat)"].run()
            torch.testing.assert_close(t.x.flatten(0, 1) @ merged.mT + t.bias, expected, rtol=1e-4, atol=1e-4)
        elif ("prepacked", "x A_catᵀ") in pieces:
            for name in ("[x | …]", "[… | z ⊙ H]"):
                pieces["prepacked", name].run()
            torch.testing.assert_close(
                pieces["prepacked", "[x | z ⊙ H] [W₀ | B_cat]ᵀ + b"].run(), expected, rtol=1e-4, atol=1e-4
            )
