"""Orthogonal projection-based continual merging (Tang et al., arXiv 2501.09522)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mingle import linalg
from mingle.io.lazy_tensors import Rows, row_blocks
from mingle.methods.base import Tensors, kept_size
from mingle.methods.tensorwise import Cost, Numbers, Seen, Survey, TensorMethod, TensorStep, moved
from mingle.nn.matrices import matrices
from mingle.tasks import TaskType


@dataclass(frozen=True)
class OpcmOptions:
    """Settings of OPCM.

    Attributes:
        alpha: the share of the sum of M's singular values whose directions are protected.
        drop_diagonal: remove the remaining diagonal of UᵀΔV too, as the paper says; the reference code's
            attempt has no effect.
    """

    alpha: float = 0.5
    drop_diagonal: bool = False


def split_rank(singular_values: Tensor, alpha: float) -> int:
    """The first index at which the cumulative sum exceeds α times the total; 0 where that is 0."""
    cumulative = singular_values.cumsum(0)
    return int((cumulative <= alpha * cumulative[-1]).sum()) if cumulative[-1] > 0 else 0


def project(delta: Tensor, merged: Tensor, alpha: float, drop_diagonal: bool) -> Tensor:
    """Δ [m, n] without the block that the leading singular directions of M [m, n] span.

    Equal to U C Vᵀ with C = UᵀΔV for the full bases U, V of M and C[:s, :s] zeroed, without forming them.
    It does not matter which of m and n is d_out.  Of [E, m, n] every matrix is projected by itself.
    """
    if delta.dim() > 2:
        parts = zip(delta, merged, strict=True)
        return torch.stack([project(d, m, alpha, drop_diagonal) for d, m in parts])
    U, S, Vh = linalg.gram_svd(merged)
    return linalg.project_out(delta, U, S, Vh, split_rank(S, alpha), drop_diagonal=drop_diagonal)


def total_norm(squares: Sequence[float]) -> float:
    """The Euclidean norm of tensors together, from the squared norm of each."""
    return float(torch.tensor(squares, dtype=torch.float64).sum().sqrt())


def summed(vector: Tensor, change: Tensor, scale: float) -> Iterator[tuple[Rows, Tensor]]:
    """λ_{t−1} M + P(Δ), in float64, before it is scaled: one block of rows after another."""
    for rows in row_blocks(vector):
        yield rows, scale * vector[rows].double() + change[rows].double()


class _Norms(Survey):
    """Projects every task vector, and sums up the norms that decide the scale.

    Args:
        seen: how many models arrived before.
        found: ``scale`` and ``mean_norm`` of the step before.
        linear: the names of the linear weights, [m, n] or several together as [E, m, n], to which P applies;
            other tensors are added as they are.
        options: see `OpcmOptions`.
    """

    sets_aside = True

    def __init__(self, seen: int, found: Numbers, linear: Collection[str], options: OpcmOptions) -> None:
        self.seen, self.found, self.linear, self.options = seen, found, linear, options

    def see(self, step: TensorStep) -> Seen:
        delta = step.delta()
        if not self.seen:
            return Seen((_square(delta), 0.0))
        vector, aside = step.vector(), {}
        change = delta
        if step.name in self.linear:
            change = project(delta, vector, self.options.alpha, self.options.drop_diagonal)
            aside["projected"] = change
        squares = (float(rows.square().sum()) for _, rows in summed(vector, change, self.found["scale"]))
        return Seen((_square(delta), sum(squares)), aside)

    def conclude(self, numbers: Sequence[tuple[float, ...]]) -> Numbers:
        norm, size = (total_norm(squares) for squares in zip(*numbers, strict=True))
        if not self.seen:
            return {"scale": 1.0, "mean_norm": norm}
        before = self.found["mean_norm"]
        mean_norm = before + (norm - before) / (self.seen + 1)
        # Where nothing was merged yet, or everything cancels, M is 0, which no scale changes.
        scale = size / mean_norm if size > 0 and mean_norm > 0 else 1.0
        return {"scale": scale, "mean_norm": mean_norm, "scale before": self.found["scale"]}


class Opcm(TensorMethod):
    """New linear weights keep clear of the leading singular directions of what was merged before.

    M ← λ_{t−1} M + P(Δ), scaled so that ‖M‖ is the mean norm of the task vectors so far; λ_t is that scale.
    A task vector of 0 counts in the mean; where M is 0, it stays 0.
    """

    name = "opcm"
    Options = OpcmOptions
    shared = ("scale", "mean_norm")
    copies = 7.0

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        self.linear = frozenset(matrices(self.tower))

    def surveys(self, seen: int) -> int:
        return 1

    def survey(self, number: int, seen: int, found: Numbers) -> Survey:
        return _Norms(seen, dict(found), self.linear, self.options)

    def elementwise(self, name: str) -> bool:
        return name not in self.linear

    def cost_of(self, name: str) -> Cost:
        aside = kept_size([self.base[name]]) if name in self.linear else 0
        return super().cost_of(name)._replace(aside=aside)

    def work_of(self, name: str) -> float:
        base = self.base[name]
        return super().work_of(name) * (min(base.shape[-2:]) if name in self.linear else 1)

    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        change = aside["projected"] if "projected" in aside else step.delta()
        if step.seen:
            scaled = torch.empty_like(change)
            for rows, whole in summed(step.vector(), change, found["scale before"]):
                scaled[rows] = whole / whole.new_tensor(found["scale"])
            change = scaled
        return moved(step.base, change), {}


def _square(tensor: Tensor) -> float:
    """‖·‖², added up block by block, so that it is the same where blocks are all there is at once."""
    return sum(float(tensor[rows].double().square().sum()) for rows in row_blocks(tensor))
