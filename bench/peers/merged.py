"""Dense merged weights: the procedure of published reference code, and what one product with a finished
weight would take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mingle.bench.inputs import Inputs
from mingle.bench.peers.peer import Peer, Step, Unavailable, step

#: dense updates that autograd would keep for the backward pass
_MOST_BYTES = {"cpu": 4e9, "cuda": 40e9}


def merge(inputs: Inputs, gates: torch.Tensor) -> torch.Tensor:
    """W₀ + Σ_i g_i B_i A_i for one gate vector [T], expert by expert."""
    weight = inputs.weight
    for gate, A, B in zip(gates, inputs.A, inputs.B, strict=True):
        weight = weight + gate * (B @ A)
    return weight


def build_per_sample(inputs: Inputs) -> Step:
    """Every sample has a weight of its own, merged densely and used once."""
    case = inputs.case
    if case.reduce != "sample":
        raise Unavailable(
            "one weight for each token"
            if case.reduce == "token"
            else "one weight for the whole batch: see dense merge"
        )
    _refuse_too_large(inputs, case.samples)

    def forward() -> torch.Tensor:
        gates = inputs.gate_values().flatten(0, 1)  # [samples, T]
        return torch.stack(
            [F.linear(x, merge(inputs, g), inputs.bias) for x, g in zip(inputs.x, gates, strict=True)]
        )

    return step(inputs, forward)


def build_dense(inputs: Inputs) -> Step:
    """One merged weight for the batch, expert by expert."""
    if inputs.case.groups > 1:
        raise Unavailable("gates differ within the batch")
    _refuse_too_large(inputs, 1)
    return step(
        inputs, lambda: F.linear(inputs.x, merge(inputs, inputs.gate_values().flatten()), inputs.bias)
    )


def _refuse_too_large(inputs: Inputs, weights: int) -> None:
    case = inputs.case
    kept = weights * (case.experts if case.backward else 1) * inputs.weight.nbytes
    if kept > _MOST_BYTES.get(inputs.x.device.type, 4e9):
        raise Unavailable(f"autograd would keep {kept / 1e9:.0f} GB of dense updates")


def build_folded(inputs: Inputs) -> Step:
    """One product with a weight merged before: the same function only as long as the gates do not change."""
    with torch.no_grad():
        weight = merge(inputs, inputs.gate_values().flatten(0, -2)[0])
    return _linear(inputs, weight)


def build_linear(inputs: Inputs) -> Step:
    """The base layer alone."""
    return _linear(inputs, inputs.weight)


def _linear(inputs: Inputs, weight: torch.Tensor) -> Step:
    def run() -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled(inputs.case.backward):
            y = F.linear(inputs.x, weight, inputs.bias)
        if not inputs.case.backward:
            return {"y": y}
        return {"y": y.detach(), "x": torch.autograd.grad(y, inputs.x, inputs.dy)[0]}

    return run


PEERS = (
    Peer(
        "per-sample merge",
        build_per_sample,
        "the public reference procedure: a dense weight per sample, expert by expert",
    ),
    Peer("dense merge", build_dense, "one dense weight for the batch, expert by expert"),
    Peer(
        "folded weight",
        build_folded,
        "a weight merged before: the same function while the gates stay as they are, otherwise a bound",
        same=lambda case: case.reduce == "batch" and not case.backward,
    ),
    Peer("nn.Linear", build_linear, "the base alone: the price of the experts", same=lambda case: False),
)
