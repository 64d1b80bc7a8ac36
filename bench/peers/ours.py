"""`mingle.functional.gated_experts`: the backend it chooses itself, and every backend by name."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from mingle import functional
from mingle.bench.check import Outputs
from mingle.bench.inputs import Inputs
from mingle.bench.peers.peer import Peer, Step, Unavailable, step
from mingle.kernels import gemm, prepack
from mingle.ops import dispatch

EXPLICIT = tuple(backend for backend in dispatch.BACKENDS if backend != "auto")


def build(inputs: Inputs, backend: str = "auto") -> Step:
    def forward() -> torch.Tensor:
        return functional.gated_experts(
            inputs.x,
            inputs.weight,
            inputs.bias,
            inputs.A,
            inputs.B,
            *inputs.all_gates(),
            reduce=inputs.case.reduce,
            gates=inputs.gates,
            frozen_gates=0 if inputs.case.routed else inputs.case.experts - 1,
            backend=backend,
        )

    return step(inputs, forward)


def _build_explicit(inputs: Inputs, backend: str) -> Step:
    run = build(inputs, backend)
    try:
        run()
    except RuntimeError as error:
        if "cannot run" not in str(error):
            raise
        raise Unavailable(str(error)) from error
    return run


def build_prepacked(inputs: Inputs) -> Step:
    """With frozen weights packed for the CPU, as `MingleLinear(…, prepack=True)` does, check for changes at
    every call included.
    """
    if inputs.case.routed or not gemm.packing_pays(inputs.x.flatten(0, 1), inputs.case.d_out):
        raise Unavailable("no packed product would be the fastest here")
    up = inputs.B.mT.clone()  # copies are found by memory: the other peers are to have none
    own = replace(inputs, weight=inputs.weight.clone(), A=inputs.A.clone(), B=up.mT)
    run = build(own)

    def packed() -> Outputs:
        prepack.keep(own.weight, own.A, up)
        return run()

    return packed


def _one_expert(inputs: Inputs) -> Inputs:
    if not inputs.case.routed:
        raise Unavailable("only where a router opens one expert per sample")
    return inputs.one_expert()


PEERS = (
    Peer("mingle", build, 'backend="auto"'),
    *(
        Peer(f"mingle {name}", functools.partial(_build_explicit, backend=name), f'backend="{name}"')
        for name in EXPLICIT
    ),
    Peer(
        "mingle prepacked",
        build_prepacked,
        "frozen weights packed for the CPU, which takes their memory again",
    ),
    Peer("mingle one expert", build, "T = 1: what routed gates should cost", adapt=_one_expert),
)
