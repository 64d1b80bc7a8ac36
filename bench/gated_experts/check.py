"""Correctness before speed: every peer against float64 on the same rounded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mingle.bench.gated_experts.inputs import Inputs, differentiated
from mingle.kernels.gated_experts import reference

#: ‖err‖/‖ref‖ allowed per tensor
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
TF32_TOLERANCE = 1.5e-3


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The limit for `dtype`; single precision is IEEE unless TF32 is allowed."""
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return TF32_TOLERANCE if dtype == torch.float32 and tf32 else TOLERANCES[dtype]


class Oracle:
    """The case in float64 by the eager reference."""

    def __init__(self, inputs: Inputs) -> None:
        t = inputs.to(torch.float64)
        layer = t.x, t.weight, t.bias, t.A, t.B
        self.expected = differentiated(t, lambda: reference.gated_experts(*layer, t.gate_values()))()

    def errors(self, run: Callable[[], Mapping[str, Tensor]]) -> dict[str, float]:
        """‖err‖/‖ref‖ of every output of `run`; infinite where one is missing or not finite."""
        found = run()
        return {name: _error(found.get(name), expected) for name, expected in self.expected.items()}


def _error(found: Tensor | None, expected: Tensor) -> float:
    if found is None or found.shape != expected.shape:
        return float("inf")
    error = float((found.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")
