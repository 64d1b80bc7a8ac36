"""Continual TIES-Merging (Yadav et al., 2023): trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mingle.methods.base import Arrival, Tensors, WeightMethod, shifted


@dataclass(frozen=True)
class TiesOptions:
    """Settings of TIES.

    Attributes:
        scaling: λ; the published values are 0.3 for 8 tasks and 0.1 for 11, 14 and 20.
        density: the share of entries that trimming keeps.
    """

    scaling: float = 0.3
    density: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: expected a value in (0, 1]")


def trim_threshold(vector: Mapping[str, torch.Tensor], density: float) -> float:
    """The magnitude of the n-th largest of all d entries of a vector, n = int(density · d).

    The entries of all tensors are ranked together.  Infinite where n is 0.  The published code keeps one
    entry more.
    """
    magnitudes = torch.cat([tensor.flatten() for tensor in vector.values()]).abs_()
    kept = int(density * len(magnitudes))
    return float(magnitudes.kthvalue(len(magnitudes) - kept + 1).values) if kept else float("inf")


def ties(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], density: float) -> Tensors:
    """TIES([first, second]): trim both vectors, and sum what agrees with the elected signs.

    Of each vector only the largest entries are kept, with all that equal the threshold.  Of these, entry by
    entry, those that have the sign of their total are added up.  Where two entries cancel exactly, no sign is
    elected and the result is 0; the published code takes the sign that is more frequent in the whole vector,
    which would make an entry depend on all others.
    """
    thresholds = [trim_threshold(vector, density) for vector in (first, second)]
    return {
        name: _agreeing([_trimmed(v[name], t) for v, t in zip((first, second), thresholds, strict=True)])
        for name in first
    }


def _trimmed(tensor: torch.Tensor, threshold: float) -> torch.Tensor:
    return torch.where(tensor.abs() >= threshold, tensor, 0)


def _agreeing(tensors: list[torch.Tensor]) -> torch.Tensor:
    stack = torch.stack(tensors)
    return torch.where(stack.sign() == stack.sum(0).sign(), stack, 0).sum(0)


class Ties(WeightMethod):
    """θ_t = θ_{t−1} + λ v with v = Δ_1 for the first task and TIES([M_{t−1}, Δ_t]) for later ones."""

    name = "ties"
    Options = TiesOptions

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        vector, delta = self.vectors(arrival.tuned)
        elected = ties(vector, delta, self.options.density) if arrival.index else delta
        return shifted(self.merged, elected, self.options.scaling), {}
