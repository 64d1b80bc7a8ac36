"""Continual task arithmetic (Ilharco et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mingle.methods.base import Arrival, Tensors, WeightMethod


@dataclass(frozen=True)
class TaskArithmeticOptions:
    """Settings of task arithmetic.

    Attributes:
        scaling: λ; the published values are 0.3 for 8 tasks and 0.1 for 11, 14 and 20.
    """

    scaling: float = 0.3


def add_task_vector(
    merged: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    tuned: Mapping[str, torch.Tensor],
    scaling: float,
) -> Tensors:
    """θ + λ (θ_t − θ₀), per tensor."""
    return {name: tensor + scaling * (tuned[name] - base[name]) for name, tensor in merged.items()}


class TaskArithmetic(WeightMethod):
    """θ_t = θ_{t−1} + λ (θ_t − θ₀)."""

    name = "task-arithmetic"
    Options = TaskArithmeticOptions

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        return add_task_vector(self.merged, self.base, arrival.tuned, self.options.scaling), {}
