"""Continual TIES-Merging (Yadav et al., 2023): trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mingle.linalg import ranking
from mingle.methods.base import Tensors
from mingle.methods.tensorwise import Numbers, Seen, Survey, TensorMethod, TensorStep, moved


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


def kept_entries(entries: int, density: float) -> int:
    """How many of that many entries trimming keeps."""
    return int(density * entries)


def trim_threshold(vector: Mapping[str, Tensor], density: float) -> float:
    """The magnitude of the n-th largest of all d entries of a vector, n = int(density · d).

    The entries of all tensors are ranked together.  Infinite where n is 0.  The published code keeps one
    entry more.
    """
    kept = kept_entries(sum(tensor.numel() for tensor in vector.values()), density)
    return ranking.nth_largest(list(vector.values()), kept) if kept else float("inf")


def ties(vectors: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """TIES of what vectors have in one tensor: trim them, and sum what agrees with the elected signs.

    Of each vector only the largest entries are kept, with all that equal its threshold.  Of these, entry by
    entry, those that have the sign of their total are added up.  Where two entries cancel exactly, no sign is
    elected and the result is 0; the published code takes the sign that is more frequent in the whole vector,
    which would make an entry depend on all others.
    """
    trimmed = [torch.where(v.abs() >= t, v, 0) for v, t in zip(vectors, thresholds, strict=True)]
    stack = torch.stack(trimmed)
    elected = stack.sum(0).sign()
    return torch.where(stack.sign() == elected, stack, 0).sum(0)


#: the vectors that are trimmed: M and Δ_t
_VECTORS = ("merged", "delta")


class _Ranking(Survey):
    """A pass of the search for both thresholds.

    Args:
        number: of the pass.
        found: the leading bits of the thresholds, and the ranks that are left.
        dtype: in which entries are compared.
    """

    def __init__(self, number: int, found: Numbers, dtype: torch.dtype) -> None:
        self.ranks = [int(found[f"{vector} rank"]) for vector in _VECTORS]
        leading = [int(found[f"{vector} bits"]) for vector in _VECTORS]
        self.digits = [ranking.DigitCount(number, bits, dtype) for bits in leading]

    def see(self, step: TensorStep) -> Seen:
        for counted, vector in zip(self.digits, (step.vector(), step.delta()), strict=True):
            counted.add(vector)
        return Seen()

    def counts(self) -> list[Tensor]:
        return [counted.counts for counted in self.digits]

    def conclude(self, numbers: Sequence[tuple[float, ...]]) -> Numbers:
        found: Numbers = {}
        for name, counted, rank in zip(_VECTORS, self.digits, self.ranks, strict=True):
            found[f"{name} bits"], found[f"{name} rank"] = counted.found(rank)
        return found


class Ties(TensorMethod):
    """θ_t = θ_{t−1} + λ v with v = Δ_1 for the first task and TIES([M_{t−1}, Δ_t]) for later ones."""

    name = "ties"
    Options = TiesOptions

    copies = 10.0

    def surveys(self, seen: int) -> int:
        return ranking.passes(self._dtype()) if seen and self._kept() else 0

    def survey(self, number: int, seen: int, found: Numbers) -> Survey:
        start = {f"{vector} bits": 0 for vector in _VECTORS}
        start |= {f"{vector} rank": self._kept() for vector in _VECTORS}
        return _Ranking(number, start | found, self._dtype())

    def elementwise(self, name: str) -> bool:
        return True

    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        change = step.delta()
        if step.seen:
            bits = [found.get(f"{vector} bits") for vector in _VECTORS]
            thresholds = [
                float("inf") if b is None else ranking.magnitude(int(b), self._dtype()) for b in bits
            ]
            change = ties((step.vector(), change), thresholds)
        return moved(step.merged, change, self.options.scaling), {}

    def _kept(self) -> int:
        return kept_entries(sum(tensor.numel() for tensor in self.base.values()), self.options.density)

    def _dtype(self) -> torch.dtype:
        """In which entries of all tensors are compared."""
        return torch.float64 if any(t.dtype == torch.float64 for t in self.base.values()) else torch.float32
