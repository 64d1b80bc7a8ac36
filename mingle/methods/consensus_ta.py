"""Continual Consensus Task Arithmetic (Wang et al., 2024): keep only those entries that enough tasks use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mingle.methods.base import Tensors
from mingle.methods.tensorwise import Cost, Numbers, TensorMethod, TensorStep, moved
from mingle.options import require_not_negative


@dataclass(frozen=True)
class ConsensusTaOptions:
    """Settings of Consensus TA.

    Attributes:
        scaling: λ.
        threshold: l of the TALL masks.
        min_masks: k, in how many masks an entry must be active.
        masks: which masks are counted.  ``newest``: the first task's, all ones, and the newest task's, as in
            the code behind the published figures, where k is 1 (keep everything) or 2 (keep what the newest
            task uses).  ``all``: those of all tasks so far, the first all ones; only then k may exceed 2.
    """

    scaling: float = 0.1
    threshold: float = 0.2
    min_masks: int = 2
    masks: Literal["newest", "all"] = "newest"

    def __post_init__(self) -> None:
        require_not_negative(self, "threshold")
        if self.min_masks < 1 or (self.masks == "newest" and self.min_masks > 2):
            raise ValueError(f"min_masks={self.min_masks}: expected 1 or 2, or more with masks='all'")


def tall_mask(vector: Tensor, delta: Tensor, threshold: float) -> Tensor:
    """Where the task is at work: |Δ_t| > l · |θ₀ + M + Δ_t − θ_t|, bool, in Δ's shape.

    All terms on the right but M cancel.
    """
    return delta.abs() > threshold * vector.abs()


def agreed(vector: Tensor, delta: Tensor, counts: Tensor, min_masks: int) -> Tensor:
    """M + Δ_t where at least `min_masks` masks are active, and 0 elsewhere."""
    return torch.where(counts >= min_masks, vector + delta, 0)


class ConsensusTa(TensorMethod):
    """θ_t = θ_{t−1} + λ v with v = Δ_1 for the first task, then the agreed entries of M_{t−1} + Δ_t.

    Entries are agreed on where at least k masks are active.  As in TIES, M takes part in v although it is
    already in θ_{t−1}, so that with each task what was agreed on before grows by λ; the published figures
    were made in this way.
    """

    name = "consensus-ta"
    Options = ConsensusTaOptions
    copies = 5.5

    def cost_of(self, name: str) -> Cost:
        counts = 2 * self.base[name].numel() if self.options.masks == "all" else 0
        return super().cost_of(name)._replace(kept=counts)

    def kept_of(self, name: str) -> tuple[str, ...]:
        return (name,) if self.options.masks == "all" else ()

    def elementwise(self, name: str) -> bool:
        return True

    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        options, delta = self.options, step.delta()
        if step.seen:
            vector = step.vector()
            # the first task's mask is all ones
            counts = step.kept.get(step.name, 1) + tall_mask(vector, delta, options.threshold).short()
            change = agreed(vector, delta, counts, options.min_masks)
        else:
            counts, change = torch.ones_like(delta, dtype=torch.int16), delta
        return moved(step.merged, change, options.scaling), dict.fromkeys(self.kept_of(step.name), counts)
