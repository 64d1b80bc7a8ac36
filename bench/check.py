"""Correctness before speed: every peer against float64 on the same rounded inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from mingle.bench import floor
from mingle.bench.inputs import Inputs
from mingle.kernels.gated_experts import reference

#: ‖err‖/‖ref‖ allowed per tensor
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
TF32_TOLERANCE = 1.5e-3

#: operations of the float64 reference above which it looks at some samples only
_MOST_FLOP = {"cpu": 2e10, "cuda": 4e12}

#: what a peer computes: y, and in a case with a backward pass the gradient of every differentiated tensor
Outputs = dict[str, torch.Tensor]


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The limit for `dtype`; single precision is IEEE unless TF32 is allowed."""
    if dtype == torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return TF32_TOLERANCE
    return TOLERANCES[dtype]


class Oracle:
    """The case in float64 by the eager reference, in large cases on some of the samples.

    There dy is set to zero on all other samples while peers are checked, so that the gradients of x and of
    the gate are those of the chosen samples' outputs, exactly, whatever the gates are pooled over.  The first
    and the last sample are always among the chosen.
    """

    def __init__(self, inputs: Inputs, seed: int = 0) -> None:
        self.inputs = inputs
        case = inputs.case
        most = _MOST_FLOP.get(inputs.x.device.type, 2e10)
        count = min(case.samples, max(2, int(case.samples * most / floor.count(case).flop)))
        inner = random.Random(seed).sample(range(1, max(1, case.samples - 1)), max(0, count - 2))
        self.samples = sorted({0, case.samples - 1, *inner})
        self.expected = self._compute()

    def errors(self, run: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, float]:
        """‖err‖/‖ref‖ of every output of `run`; infinite where one is missing or not finite."""
        with self.masked():
            found = run()
            return {
                name: self._error(found.get(name), expected, name) for name, expected in self.expected.items()
            }

    @contextmanager
    def masked(self) -> Iterator[None]:
        """dy is zero on the samples that the oracle leaves out; in place, since captured peers hold on to its
        memory.
        """
        kept = self.inputs.dy.clone()
        outside = sorted(set(range(self.inputs.case.samples)) - set(self.samples))
        self.inputs.dy[outside] = 0
        try:
            yield
        finally:
            self.inputs.dy.copy_(kept)

    def _error(self, found: torch.Tensor | None, expected: torch.Tensor, name: str) -> float:
        if found is None:
            return float("inf")
        rows = found[self.samples] if name == "y" else found
        if rows.shape != expected.shape:
            return float("inf")
        error = float((rows.double() - expected).norm() / expected.norm())
        return error if error == error else float("inf")

    def _compute(self) -> Outputs:
        inputs, case = self.inputs.to(torch.float64), self.inputs.case
        with torch.set_grad_enabled(case.backward):
            gates = inputs.gate_values()
            gates = gates[self.samples] if len(gates) == case.samples else gates
            y = reference.gated_experts(
                inputs.x[self.samples], inputs.weight, inputs.bias, inputs.A, inputs.B, gates
            )
        if not case.backward:
            return {"y": y}
        wanted = inputs.differentiated()
        gradients = torch.autograd.grad(y, tuple(wanted.values()), inputs.dy[self.samples])
        return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}
