"""Other peers behind torch.compile or a CUDA graph: the same arithmetic with fewer launches."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable

import torch

from mingle.bench.check import Outputs
from mingle.bench.inputs import Inputs
from mingle.bench.peers import handmade, ours
from mingle.bench.peers.peer import Peer, Step, Unavailable, step

_WARM_UP = 3


def build_compiled(inputs: Inputs) -> Step:
    """The hand-made chain under torch.compile, without a place left for it to search on GPUs."""
    cuda = inputs.x.is_cuda
    if not cuda and not _has_cpp_compiler():
        raise Unavailable("torch.compile needs a C++ compiler on the CPU")
    torch._dynamo.reset()  # one peer at a time: earlier ones would count towards the limit of recompilations
    down, up = handmade.side_by_side(inputs)
    inputs.all_gates()  # joined before tracing
    compiled = torch.compile(
        handmade.chain, dynamic=False, fullgraph=True, mode="max-autotune" if cuda else "default"
    )

    def forward() -> torch.Tensor:
        if cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return compiled(inputs, down, up, in_place=False)

    run = step(inputs, forward)
    run()
    return run


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))


def build_graphed(inputs: Inputs, build: Callable[[Inputs], Step]) -> Step:
    """Another peer's step, backward included, recorded once and replayed; outputs stay in the graph's memory."""
    if not inputs.x.is_cuda:
        raise Unavailable("CUDA graphs need a CUDA device")
    run = build(inputs)
    stream = torch.cuda.Stream(inputs.x.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = run()
    except RuntimeError as error:
        raise Unavailable(f"cannot be captured: {error}") from error

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


PEERS = (
    Peer("grouped compiled", build_compiled, "three GEMMs by hand under torch.compile", captured=True),
    Peer(
        "grouped CUDA graph",
        functools.partial(build_graphed, build=handmade.build_chain),
        "three GEMMs by hand, replayed",
        captured=True,
    ),
    Peer("mingle CUDA graph", functools.partial(build_graphed, build=ours.build), "replayed", captured=True),
)
