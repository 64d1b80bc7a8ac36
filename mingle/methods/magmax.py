"""MagMax (Marczak et al., 2024): entry by entry, the task vector of largest magnitude.

Here the models are fine-tuned independently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mingle.methods.base import Tensors
from mingle.methods.tensorwise import Numbers, TensorMethod, TensorStep, moved


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


def larger(first: Tensor, second: Tensor) -> Tensor:
    """Entry by entry, the one of larger magnitude; where both are equally large, that of `first`."""
    return torch.where(second.abs() > first.abs(), second, first)


class MagMax(TensorMethod):
    """θ_t = θ₀ + λ v with v the larger of M_{t−1} / λ and Δ_t, entry by entry."""

    name = "magmax"
    Options = MagMaxOptions
    copies = 4.25

    def elementwise(self, name: str) -> bool:
        return True

    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        scaling = self.options.scaling
        return moved(step.base, larger(step.vector() / scaling, step.delta()), scaling), {}
