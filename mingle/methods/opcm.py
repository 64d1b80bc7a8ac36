"""Orthogonal projection-based continual merging (Tang et al., arXiv 2501.09522)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mingle.io.lazy_tensors import BLOCK_ENTRIES, Rows, row_blocks
from mingle.kernels.dtypes import wide
from mingle.linalg.spectrum import remover
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

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: expected a value in [0, 1]")


def split_rank(singular_values: Tensor, alpha: float) -> int:
    """The first index at which the cumulative sum exceeds α times the total; 0 where that is 0."""
    cumulative = singular_values.cumsum(0)
    return int((cumulative <= alpha * cumulative[-1]).sum()) if cumulative[-1] > 0 else 0


def project(step: TensorStep, options: OpcmOptions) -> Tensor:
    """Δ [m, n] without the block that the leading singular directions of M [m, n] span.

    Equal to U C Vᵀ with C = UᵀΔV for the full bases U, V of M and C[:s, :s] zeroed, without them: in memory
    beside the result are blocks of rows, and matrices of the shorter side.  It does not matter which of m and
    n is d_out.  Of [E, m, n] every matrix is projected by itself.
    """
    if step.merged.dim() == 2:
        return _projected(step, options)
    return torch.stack([_projected(step.at(place), options) for place in range(len(step.merged))])


def _projected(step: TensorStep, options: OpcmOptions) -> Tensor:
    shape = step.merged.shape
    flipped = shape[0] < shape[1]
    if flipped:
        step = step.transposed()
    parts = [(rows, step.at(rows)) for rows in row_blocks(step.merged)]
    blocks = ((part.vector(), part.delta()) for _, part in parts)
    leading = partial(split_rank, alpha=options.alpha)
    K = remover(blocks, leading, drop_diagonal=options.drop_diagonal)
    projected = step.merged.new_empty(shape, dtype=wide(step.tuned))
    out = projected.mT if flipped else projected
    for rows, part in parts:
        out[rows] = part.delta().double() - part.vector().double() @ K
    return projected


def total_norm(squares: Sequence[float]) -> float:
    """The Euclidean norm of tensors together, from the squared norm of each."""
    return float(torch.tensor(squares, dtype=torch.float64).sum().sqrt())


def summed(step: TensorStep, aside: Mapping[str, Tensor], rows: Rows, scale: float) -> Tensor:
    """λ_{t−1} M + P(Δ) of some rows, in float64, before it is scaled."""
    part = step.at(rows)
    change = aside["projected"][rows] if aside else part.delta()
    return scale * part.vector().double() + change.double()


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
        blocks = row_blocks(step.merged)
        square = sum(float(step.at(block).delta().double().square().sum()) for block in blocks)
        if not self.seen:
            return Seen((square, 0.0))
        aside: dict[str, Tensor] = {}
        if step.name in self.linear:
            aside["projected"] = project(step, self.options)
        scale = self.found["scale"]
        whole = (float(summed(step, aside, block, scale).square().sum()) for block in blocks)
        return Seen((square, sum(whole)), aside)

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
    copies = 10.0

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        self.linear = frozenset(matrices(self.tower))

    def surveys(self, seen: int) -> int:
        return 1

    def survey(self, number: int, seen: int, found: Numbers) -> Survey:
        return _Norms(seen, dict(found), self.linear, self.options)

    def elementwise(self, name: str) -> bool:
        return name not in self.linear

    def in_rows(self, name: str) -> bool:
        return True

    def cost_of(self, name: str) -> Cost:
        base = self.base[name]
        if name not in self.linear:
            return super().cost_of(name)
        size, shorter = kept_size([base]), min(base.shape[-2:])
        # in float64: blocks of rows; matrices of the shorter side while M is decomposed, or P(Δ) after that
        blocks = 40 * min(base.numel(), BLOCK_ENTRIES)
        return Cost(blocks + max(64 * shorter**2, size + 16 * shorter**2), aside=size)

    def work_of(self, name: str) -> float:
        base = self.base[name]
        return super().work_of(name) * (min(base.shape[-2:]) if name in self.linear else 1)

    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        if not step.seen:
            return moved(step.base, step.delta()), {}
        new = step.merged.new_empty(step.merged.shape, dtype=wide(step.base))
        for rows in row_blocks(new):
            whole = summed(step, aside, rows, found["scale before"])
            change = (whole / whole.new_tensor(found["scale"])).to(wide(step.tuned))
            new[rows] = moved(step.base[rows], change)
        return new, {}
