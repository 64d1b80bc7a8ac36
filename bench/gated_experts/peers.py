"""What is compared: this library in all its forms, other packages, and what is written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mingle import functional
from mingle.bench.gated_experts import handmade, packages
from mingle.bench.gated_experts.cases import KernelCase
from mingle.bench.gated_experts.floor import fastest, products
from mingle.bench.gated_experts.inputs import Inputs, Outputs, Pass, differentiated
from mingle.bench.measure import OURS, Unavailable, need
from mingle.kernels import gemm, prepack
from mingle.ops import dispatch


@dataclass(frozen=True)
class KernelPeer:
    """One way to compute a case.

    `build` makes the callable, or raises `Unavailable`; `adapt`: the tensors it works on instead of the
    case's, with an oracle of their own; `same`: whether it computes the case's function, otherwise it is a
    bound; `captured`: its memory belongs to a CUDA graph, so that peak memory says nothing.
    """

    name: str
    build: Callable[[Inputs], Pass]
    note: str
    adapt: Callable[[Inputs], Inputs] = lambda inputs: inputs
    same: Callable[[KernelCase], bool] = lambda case: True
    captured: bool = False


EXPLICIT = tuple(backend for backend in dispatch.BACKENDS if backend != "auto")


def build(t: Inputs, backend: str = "auto") -> Pass:
    """`mingle.functional.gated_experts` with the backend it chooses itself, or the one named."""
    frozen = 0 if t.case.routed else t.case.experts - 1
    options: dict[str, Any] = dict(reduce=t.case.reduce, gates=t.gates, frozen_gates=frozen, backend=backend)

    def forward() -> Tensor:
        return functional.gated_experts(t.x, t.weight, t.bias, t.A, t.B, *t.all_gates(), **options)

    return differentiated(t, forward)


def _build_explicit(t: Inputs, backend: str) -> Pass:
    run = build(t, backend)
    try:
        run()
    except RuntimeError as error:
        if "cannot run" not in str(error):
            raise
        raise Unavailable(str(error)) from error
    return run


def build_prepacked(t: Inputs) -> Pass:
    """As `MingleLinear(…, prepack=True)` does, check for changed weights at every call included."""
    pays = not t.case.routed and gemm.packing_pays(t.x.flatten(0, 1), t.case.d_out)
    need(pays, "no packed product would be the fastest here")
    up = t.B.mT.clone()  # copies are found by memory: the other peers are to have none
    own = replace(t, weight=t.weight.clone(), A=t.A.clone(), B=up.mT)
    run = build(own)

    def packed() -> Outputs:
        prepack.keep(own.weight, own.A, up)
        return run()

    return packed


def _one_expert(t: Inputs) -> Inputs:
    need(t.case.routed, "only where a router opens one expert per sample")
    return t.one_expert()


def build_products(t: Inputs) -> Pass:
    """The low-rank path's products and nothing else, each in the library that is fastest at it here."""
    need(not t.case.routed, "the products depend on the routing")
    down, up = t.side_by_side()
    x, dy = t.x.detach().flatten(0, 1), t.dy.flatten(0, 1)
    hidden = x @ down.mT
    pairs = [(x, down), (x, t.weight), (hidden, up.mT)]
    pairs += [(dy, up), (dy, t.weight.mT), (hidden, down.mT)] if t.case.backward else []
    with torch.no_grad():
        chosen = [min(products(*pair), key=lambda run: fastest(run, x.device)) for pair in pairs]

    def run() -> Outputs:
        with torch.no_grad():
            return {str(i): product() for i, product in enumerate(chosen)}

    return run


def replayed(build: Callable[[Inputs], Pass]) -> Callable[[Inputs], Pass]:
    """Another peer's pass, recorded once in a CUDA graph; outputs stay in the graph's memory."""

    def build_graph(t: Inputs) -> Pass:
        need(t.x.is_cuda, "CUDA graphs need a CUDA device")
        run, graph, stream = build(t), torch.cuda.CUDAGraph(), torch.cuda.Stream(t.x.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # warms up
                run()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph):
                outputs = run()
        except RuntimeError as error:
            raise Unavailable(f"cannot be captured: {error}") from error

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    return build_graph


_KERNELS = replayed(partial(_build_explicit, backend="triton"))
_GEMMS = "three GEMMs by hand"
_LOOP_32 = "the eager reference on the same values in fp32"
_PER_SAMPLE = "the public reference procedure: a dense weight per sample, expert by expert"
_FOLDED = "a weight merged before: the same function while the gates stay as they are, otherwise a bound"
_BASE = "the base alone: the price of the experts"
_PACKED = "frozen weights packed for the CPU, which takes their memory again"
_ALONE = "the low-rank path's products and nothing else"
#: by name
PEERS = {
    peer.name: peer
    for peer in (
        KernelPeer(OURS, build, 'backend="auto"'),
        *(KernelPeer(f"mingle {b}", partial(_build_explicit, backend=b), f'backend="{b}"') for b in EXPLICIT),
        KernelPeer("mingle prepacked", build_prepacked, _PACKED),
        KernelPeer("mingle one expert", build, "T = 1: what routed gates should cost", adapt=_one_expert),
        KernelPeer("mingle CUDA graph", _KERNELS, "the kernels, replayed", captured=True),
        KernelPeer("eager loop", handmade.loop, "the eager reference, expert by expert"),
        KernelPeer("eager loop fp32", handmade.loop, _LOOP_32, adapt=handmade.single_precision),
        KernelPeer("grouped eager", handmade.chained, _GEMMS),
        KernelPeer("fold eager", handmade.folding, "fold, then one GEMM, by hand"),
        KernelPeer("grouped compiled", handmade.compiled, f"{_GEMMS} under torch.compile", captured=True),
        KernelPeer("grouped CUDA graph", replayed(handmade.chained), f"{_GEMMS}, replayed", captured=True),
        KernelPeer("per-sample merge", handmade.per_sample, _PER_SAMPLE),
        KernelPeer("dense merge", handmade.dense, "one dense weight for the batch, expert by expert"),
        KernelPeer("folded weight", handmade.folded, _FOLDED, same=handmade.folds),
        KernelPeer("nn.Linear", handmade.linear, _BASE, same=lambda case: False),
        KernelPeer("peft x-lora", packages.xlora, "PEFT's X-LoRA layer, driven by our gates"),
        KernelPeer("vllm lora", packages.vllm, "F.linear, then vLLM's kernels, for tokens sorted before"),
        KernelPeer("gemms alone (best library)", build_products, _ALONE, same=lambda case: False),
    )
}
#: built in tens of seconds: left out unless the case is `compiled` or they are asked for
SLOW_TO_BUILD = ("grouped compiled",)
#: ways to compute a case among which `backend="auto"` chooses, or could have
STRATEGIES = (OURS, *(f"mingle {backend}" for backend in EXPLICIT), "grouped eager", "fold eager")
