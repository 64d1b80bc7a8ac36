"""The tensors of a case: random, and scaled so that a wrong expert or gate cannot hide in rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mingle.bench.gated_experts.cases import KernelCase
from mingle.kernels.gated_experts import reference

#: y, and in a case with a backward pass the gradient of every differentiated tensor
Outputs = dict[str, Tensor]
#: one forward pass, or one forward and backward pass where the case says so
Pass = Callable[[], Outputs]


@dataclass(frozen=True)
class Inputs:
    """x [samples, tokens, d_in], W₀ [d_out, d_in], b, A [T, r, d_in], B [T, d_out, r], dy, the gates of all
    experts but the newest and the newest one's, and a router's gates [samples, T].

    In a case with a backward pass x and the newest gate require gradients.  B is a view of [T, r, d_out], as
    `MingleLinear` stores it.
    """

    case: KernelCase
    x: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    frozen_gate_weight: Tensor
    frozen_gate_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    dy: Tensor
    gates: Tensor | None = None

    def all_gates(self) -> tuple[Tensor, Tensor]:
        """w [T, d_in] and β [T]; gradients flow to the newest.  Joined once where there are none."""
        return self._joined() if self.case.backward else self._joined_once

    def _joined(self) -> tuple[Tensor, Tensor]:
        weights, biases = (self.frozen_gate_weight, self.gate_weight), (self.frozen_gate_bias, self.gate_bias)
        return torch.cat(weights), torch.cat(biases)

    _joined_once = cached_property(_joined)

    def gate_values(self) -> Tensor:
        """The gates, linear in x or as given; they broadcast against [samples, tokens, T]."""
        if self.gates is not None:
            return self.gates.to(self.x.dtype).unsqueeze(1)
        return reference.gate_values(self.x, *self.all_gates(), self.case.reduce).to(self.x.dtype)

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """A_cat [R, d_in] and B_cat [R, d_out], copies of their own."""
        return self.A.flatten(0, 1).contiguous(), self.B.mT.flatten(0, 1).contiguous()

    def differentiated(self) -> dict[str, Tensor]:
        """The tensors whose gradients a backward pass makes."""
        gate = {} if self.case.routed else {"gate_weight": self.gate_weight, "gate_bias": self.gate_bias}
        return {"x": self.x, **gate}

    def to(self, dtype: torch.dtype) -> Inputs:
        """Copies in that dtype, to which nothing else refers."""
        tensors = {k: v.detach() for k, v in vars(self).items() if isinstance(v, Tensor)}
        kept = torch.float32 if dtype.itemsize == 2 else dtype  # of the gates, as `MingleLinear` keeps them
        made: dict[str, Any] = {
            k: v.to(kept if "gate" in k else dtype, copy=True) for k, v in tensors.items()
        }
        copied = replace(self, **made)
        for tensor in copied.differentiated().values():
            tensor.requires_grad_(self.case.backward)
        return copied

    def one_expert(self) -> Inputs:
        """The same layer with its first expert alone, open to every sample."""
        assert self.gates is not None
        case, gates = replace(self.case, experts=1), torch.ones_like(self.gates[:, :1])
        return replace(self, case=case, A=self.A[:1], B=self.B[:1], gates=gates).to(self.x.dtype)


def differentiated(t: Inputs, forward: Callable[[], Tensor]) -> Pass:
    """`forward` without gradients, or with those of x and the newest gate for the upstream gradient dy."""
    wanted = t.differentiated() if t.case.backward else {}

    def run() -> Outputs:
        with torch.set_grad_enabled(bool(wanted)):
            y = forward()
        gradients = torch.autograd.grad(y, tuple(wanted.values()), t.dy) if wanted else ()
        return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}

    return run


def make(case: KernelCase, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs, the same on every device.

    Every expert adds about as much to y as the base does: leaving one out is an error of 1/√(T + 1), well
    above bf16's limit.  dy holds some of the newest expert's output, as a gate's gradient, a sum over tokens
    and features, could otherwise cancel to nothing.  The 1/√N keeps fp16 from overflowing.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, variance: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(variance**0.5).to(device)

    T, r, d_in, d_out = case.experts, case.rank, case.d_in, case.d_out
    x, A = normal(case.samples, case.tokens, d_in), normal(T, r, d_in, variance=1 / d_in)
    B_transposed, w = normal(T, r, d_out, variance=1 / r), normal(T, d_in, variance=1 / d_in)
    bias = normal(T).sign() * (0.5 + torch.rand(T, generator=generator).to(device))
    # the part that keeps its sign is at least 8 σ of the rest in a sample
    share = max(0.1, 8 / (case.tokens * d_out) ** 0.5)
    dy = normal(case.samples, case.tokens, d_out) + share * (x @ A[-1].mT @ B_transposed[-1])
    gates = None
    if case.routed:
        chosen = torch.randint(T, (case.samples,), generator=generator).sort().values
        gates = torch.nn.functional.one_hot(chosen, T).float().to(device)
    layer = normal(d_out, d_in, variance=1 / d_in), normal(d_out), A, B_transposed.mT
    inputs = Inputs(case, x, *layer, w[:-1], bias[:-1], w[-1:], bias[-1:], dy / case.rows**0.5, gates)
    return inputs.to(case.torch_dtype)
