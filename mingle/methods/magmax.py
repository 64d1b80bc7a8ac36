"""MagMax (Marczak et al., 2024): entry by entry, the task vector of largest magnitude.

Here the models are fine-tuned independently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mingle.methods.base import Arrival, Tensors, WeightMethod, shifted


@dataclass(frozen=True)
class MagMaxOptions:
    """Settings of MagMax.

    Attributes:
        scaling: λ.
    """

    scaling: float = 0.5

    def __post_init__(self) -> None:
        if self.scaling <= 0:
            reason = "which divides the earlier merge"
            raise ValueError(f"scaling={self.scaling}: expected a positive value, {reason}")


def larger(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> Tensors:
    """Entry by entry, the one of larger magnitude; where both are equally large, that of `first`."""
    return {
        name: torch.where(second[name].abs() > tensor.abs(), second[name], tensor)
        for name, tensor in first.items()
    }


class MagMax(WeightMethod):
    """θ_t = θ₀ + λ v with v the larger of M_{t−1} / λ and Δ_t, entry by entry."""

    name = "magmax"
    Options = MagMaxOptions

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        vector, delta = self.vectors(arrival.tuned)
        largest = larger({name: tensor / self.options.scaling for name, tensor in vector.items()}, delta)
        return shifted(self.base, largest, self.options.scaling), {}
