"""Continual Consensus Task Arithmetic (Wang et al., 2024): keep only those entries that enough tasks use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from mingle.methods.base import Arrival, Tensors, WeightMethod, shifted
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


def tall_mask(vector: torch.Tensor, delta: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where the task is at work: |Δ_t| > l · |θ₀ + M + Δ_t − θ_t|, bool, in Δ's shape.

    All terms on the right but M cancel.
    """
    return delta.abs() > threshold * vector.abs()


def agreed(
    vector: Mapping[str, torch.Tensor], delta: Mapping[str, torch.Tensor], counts: Tensors, min_masks: int
) -> Tensors:
    """M + Δ_t where at least `min_masks` masks are active, and 0 elsewhere."""
    return {name: torch.where(counts[name] >= min_masks, vector[name] + d, 0) for name, d in delta.items()}


class ConsensusTa(WeightMethod):
    """θ_t = θ_{t−1} + λ v with v = Δ_1 for the first task, then the agreed entries of M_{t−1} + Δ_t.

    Entries are agreed on where at least k masks are active.  As in TIES, M takes part in v although it is
    already in θ_{t−1}, so that with each task what was agreed on before grows by λ; the published figures
    were made in this way.
    """

    name = "consensus-ta"
    Options = ConsensusTaOptions

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        options = self.options
        vector, delta = self.vectors(arrival.tuned)
        if not arrival.index:
            counts = {name: torch.ones_like(d, dtype=torch.int16) for name, d in delta.items()}
            return shifted(self.merged, delta, options.scaling), counts if options.masks == "all" else {}
        counts = {
            name: self.state.get(name, 1) + tall_mask(vector[name], d, options.threshold).short()
            for name, d in delta.items()
        }
        kept = agreed(vector, delta, counts, options.min_masks)
        return shifted(self.merged, kept, options.scaling), counts if options.masks == "all" else {}
