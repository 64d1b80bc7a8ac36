"""The kernels on a GPU: what compiles when, that gates of 0 cost nothing, and what `auto` chooses."""

from __future__ import annotations

import statistics
from itertools import product

import pytest
import torch
from gpu_cases import DEVICE, SHAPES, Shape, capture, make
from torch import nn

from mingle.kernels import chips
from mingle.ops import dispatch

pytestmark = pytest.mark.gpu


def test_another_number_of_tokens_compiles_nothing(monkeypatch):
    """Sizes that share a tile share the code; Triton would by itself make new code for the values 1 and
    multiples of 16.
    """
    triton = pytest.importorskip("triton")
    from mingle.kernels.gated_experts import descriptors, fold, gates
    from mingle.kernels.gated_experts import triton as kernels

    compiled: list[str] = []
    for module in (kernels, gates, descriptors, fold):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.runtime.JITFunction):
                kernel.device_caches.clear()  # what other tests compiled
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **found: compiled.append(found["repr"])
    )

    def steps(*sizes: tuple[int, int]) -> None:
        for reduce, leading in product(("token", "sample", "batch"), sizes):
            make(Shape(leading, 104, 72, 3, 8), torch.bfloat16, reduce).solve("triton")

    steps((2, 50))
    assert compiled
    compiled.clear()
    steps((2, 50), (2, 41), (2, 64), (3, 37), (2, 33))  # 65 to 128 tokens, samples of 33 to 64
    assert not compiled


def seconds(*graphs: torch.cuda.CUDAGraph, rounds: int = 40, replays: int = 5) -> list[float]:
    """The median time of each graph by CUDA events, the graphs taking turns; the host's share stays out."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, own in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            own.append(start.elapsed_time(end) / 1e3 / replays)
    return [statistics.median(own) for own in times]


def test_the_cost_of_one_expert_per_sample_hardly_depends_on_how_many_there_are():
    many, one = (
        make(
            Shape((128, 197), 768, 768, experts, 64), torch.bfloat16, "given sample", zeros=True, needs=set()
        )
        for experts in (64, 1)
    )
    chosen = torch.arange(128, device=DEVICE) // 2
    many.tensors["gates"].copy_(nn.functional.one_hot(chosen, 64))
    one.tensors["gates"].fill_(1)
    with torch.no_grad():
        (long_graph, _), (short_graph, _) = (
            capture(lambda problem=problem: problem.solve("triton")) for problem in (many, one)
        )
    long, short = seconds(long_graph, short_graph)
    assert long <= 1.3 * short, f"{long * 1e6:.0f} µs with 64 experts, {short * 1e6:.0f} µs with one"


def test_auto_runs_what_the_model_of_costs_says(monkeypatch):
    """Here an H100, or another chip with a table."""
    asked = []
    real = dispatch.cheapest
    monkeypatch.setattr(
        dispatch, "cheapest", lambda *arguments: (asked.append(real(*arguments)), asked[-1])[1]
    )
    problem = make(SHAPES["one image"], torch.bfloat16, "token", needs=set())
    problem.solve("auto")
    measured = chips.family(chips.chip(DEVICE)).measured
    assert asked == ["triton" if measured else "grouped"]
