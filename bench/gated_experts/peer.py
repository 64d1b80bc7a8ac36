"""A peer: a name, and a function that makes a callable of a case's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mingle.bench.gated_experts.cases import KernelCase
from mingle.bench.gated_experts.inputs import Inputs, Outputs, Pass
from mingle.bench.measure import Unavailable


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


def replayed(build: Callable[[Inputs], Pass]) -> Callable[[Inputs], Pass]:
    """Another peer's pass, recorded once in a CUDA graph; outputs stay in the graph's memory."""

    def build_graph(t: Inputs) -> Pass:
        if not t.x.is_cuda:
            raise Unavailable("CUDA graphs need a CUDA device")
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
