"""What a case of the kernels' benchmark costs at least."""

from __future__ import annotations

import pytest
from tiny_cases import CPU, tiny

from mingle.bench import measure
from mingle.bench.gated_experts import cases, floor
from mingle.bench.gated_experts.cases import KernelCase


@pytest.mark.parametrize(
    ("shape", "giga_flop", "base", "mega_bytes", "chain"),
    [("vit-b16", 129.7, 29.7, 254, 461), ("vit-b32", 6.9, 3.8, 17.7, None), ("image", 0.26, 0.06, 5.6, None)],
)
def test_counts_are_those_of_the_published_table(shape, giga_flop, base, mega_bytes, chain):
    case = cases.CASES[f"{shape}-token-bf16"]
    count = floor.count(case)
    assert count.algorithm == "low-rank"
    assert count.flop / 1e9 == pytest.approx(giga_flop, rel=0.02)
    assert count.base_flop / 1e9 == pytest.approx(base, rel=0.02)
    assert count.bytes / 1e6 == pytest.approx(mega_bytes, rel=0.01)
    if chain:
        assert floor.work(case).chain_bytes / 1e6 == pytest.approx(chain, rel=0.01)


def test_the_floor_of_the_large_case_on_an_h100():
    seconds, bound = floor.floor(
        cases.CASES["vit-b16-token-bf16"], floor.Ceilings({"bfloat16": 798e12}, 3e12)
    )
    assert bound == "arithmetic"
    assert seconds == pytest.approx(162e-6, rel=0.01)


@pytest.mark.parametrize(("d_out", "threshold"), [(768, 384), (3072, 614)])
def test_folding_is_counted_where_it_is_cheaper(d_out, threshold):
    below, above = (KernelCase("", 1, threshold + more, 768, d_out, 8, reduce="batch") for more in (-2, 2))
    assert floor.count(below).algorithm == "low-rank"
    assert floor.count(above).algorithm == "folded"
    assert floor.work(above).forward_flop / floor.work(above).folded_forward_flop == pytest.approx(
        1, rel=0.02
    )


def test_a_backward_pass_doubles_the_products_and_routing_counts_one_expert():
    case = tiny(backward=True)
    assert 1.9 < floor.count(case).flop / floor.count(tiny()).flop < 2.2
    assert floor.count(case).bytes > 2 * floor.count(tiny()).bytes
    assert floor.work(tiny(routed=True)).forward_flop == pytest.approx(
        floor.work(tiny(experts=1)).forward_flop, rel=0.02
    )


def test_ceilings_are_the_work_over_the_shortest_time(monkeypatch):
    clock = iter([0.0, 7.0, 10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls = []
    assert floor.fastest(lambda: calls.append(None), CPU, repetitions=3) == 0.5 and len(calls) == 3
    for seconds in (0.5, 0.25):
        monkeypatch.setattr(floor, "fastest", lambda run, device, seconds=seconds: (run(), seconds)[1])
        limits = floor.ceilings(["float32"], CPU, gemm_size=64, copy_bytes=2**16)
        assert limits.flop_per_second == {"float32": 2 * 64**3 / seconds}
        assert limits.bytes_per_second == 2 * 2**16 / seconds
