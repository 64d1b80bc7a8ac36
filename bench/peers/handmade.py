"""The same sum as one would write it with PyTorch alone: expert by expert, as three large products, or folded
for one gate vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mingle.bench.inputs import Inputs
from mingle.bench.peers.peer import Peer, Step, Unavailable, step
from mingle.kernels.gated_experts import reference


def build_loop(inputs: Inputs) -> Step:
    """The published way: one expert after another, each with two narrow products and an addition into y."""
    t = inputs
    return step(t, lambda: reference.gated_experts(t.x, t.weight, t.bias, t.A, t.B, t.gate_values()))


def build_chain(inputs: Inputs) -> Step:
    """Three GEMMs: all A side by side, the base, all B side by side added into y; gates multiplied in place
    where nothing is saved.
    """
    down, up = side_by_side(inputs)
    return step(inputs, lambda: chain(inputs, down, up, in_place=not inputs.case.backward))


def side_by_side(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A_cat [R, d_in] and B_cat [R, d_out], made once."""
    return inputs.A.flatten(0, 1).contiguous(), inputs.B.mT.flatten(0, 1).contiguous()


def chain(inputs: Inputs, down: torch.Tensor, up: torch.Tensor, in_place: bool) -> torch.Tensor:
    case, gates = inputs.case, inputs.gate_values().unsqueeze(-1)  # [samples or 1, tokens or 1, T, 1]
    hidden = F.linear(inputs.x, down).unflatten(-1, (case.experts, case.rank))
    hidden = hidden.mul_(gates) if in_place else hidden * gates
    y, hidden = (
        F.linear(inputs.x, inputs.weight, inputs.bias).flatten(0, 1),
        hidden.reshape(case.rows, len(down)),
    )
    y = y.addmm_(hidden, up) if in_place else torch.addmm(y, hidden, up)
    return y.unflatten(0, (case.samples, case.tokens))


def build_fold(inputs: Inputs) -> Step:
    """One product makes W₀ + B_cat diag(g) A_cat, one more applies it: right for one gate vector."""
    if inputs.case.groups > 1:
        raise Unavailable("gates differ within the batch")
    down, up = side_by_side(inputs)

    def forward() -> torch.Tensor:
        gates = inputs.gate_values().flatten().repeat_interleave(inputs.case.rank)  # [R]
        return F.linear(inputs.x, torch.addmm(inputs.weight, (up * gates.unsqueeze(1)).mT, down), inputs.bias)

    return step(inputs, forward)


def _single_precision(inputs: Inputs) -> Inputs:
    if inputs.case.dtype == "float32":
        raise Unavailable("the case is in fp32 already")
    return inputs.to(torch.float32)


PEERS = (
    Peer("eager loop", build_loop, "the eager reference, expert by expert"),
    Peer(
        "eager loop fp32",
        build_loop,
        "the eager reference on the same values in fp32",
        adapt=_single_precision,
    ),
    Peer("grouped eager", build_chain, "three GEMMs by hand"),
    Peer("fold eager", build_fold, "fold, then one GEMM, by hand"),
)
