"""Continual task arithmetic (Ilharco et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mingle.methods.base import Tensors
from mingle.methods.tensorwise import Numbers, TensorMethod, TensorStep


@dataclass(frozen=True)
class TaskArithmeticOptions:
    """Settings of task arithmetic.

    Attributes:
        scaling: λ; the published values are 0.3 for 8 tasks and 0.1 for 11, 14 and 20.
    """

    scaling: float = 0.3


def add_task_vector(merged: Tensor, base: Tensor, tuned: Tensor, scaling: float) -> Tensor:
    """θ + λ (θ_t − θ₀)."""
    change = tuned - base
    change *= scaling  # in place, as there is room for few tensors of the largest size
    change += merged
    return change


class TaskArithmetic(TensorMethod):
    """θ_t = θ_{t−1} + λ (θ_t − θ₀)."""

    name = "task-arithmetic"
    Options = TaskArithmeticOptions
    copies = 2.0

    def elementwise(self, name: str) -> bool:
        return True

    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        return add_task_vector(step.merged, step.base, step.tuned, self.options.scaling), {}
