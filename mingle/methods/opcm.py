"""Orthogonal projection-based continual merging (Tang et al., arXiv 2501.09522)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from mingle import linalg
from mingle.methods.base import Arrival, Tensors, WeightMethod, shifted
from mingle.nn.matrices import matrices


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


def split_rank(singular_values: torch.Tensor, alpha: float) -> int:
    """The first index at which the cumulative sum exceeds α times the total; 0 where that is 0."""
    cumulative = singular_values.cumsum(0)
    return int((cumulative <= alpha * cumulative[-1]).sum()) if cumulative[-1] > 0 else 0


def project(delta: torch.Tensor, merged: torch.Tensor, alpha: float, drop_diagonal: bool) -> torch.Tensor:
    """Δ [m, n] without the block that the leading singular directions of M [m, n] span.

    Equal to U C Vᵀ with C = UᵀΔV for the full bases U, V of M and C[:s, :s] zeroed, without forming them.
    It does not matter which of m and n is d_out.  Of [E, m, n] every matrix is projected by itself.
    """
    if delta.dim() > 2:
        parts = zip(delta, merged, strict=True)
        return torch.stack([project(d, m, alpha, drop_diagonal) for d, m in parts])
    U, S, Vh = linalg.gram_svd(merged)
    return linalg.project_out(delta, U, S, Vh, split_rank(S, alpha), drop_diagonal=drop_diagonal)


def total_norm(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all tensors together, float64."""
    return torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt()


def opcm_step(
    vector: Tensors, delta: Tensors, state: Tensors, step: int, linear: Collection[str], options: OpcmOptions
) -> tuple[Tensors, Tensors]:
    """M_t and the running state, after `step` earlier models.

    M ← λ_{t−1} M + P(Δ), scaled so that ‖M‖ is the mean norm of the task vectors so far; λ_t is that scale.
    A task vector of 0 counts in the mean; where M is 0, it stays 0.

    Args:
        vector: M_{t−1} by name.
        delta: Δ_t by name.
        state: the running state, ``scale`` and ``mean_norm``.
        step: how many models were merged before.
        linear: the names of the linear weights, [m, n] or several together as [E, m, n], to which P applies;
            other tensors are added as they are.
        options: see `OpcmOptions`.
    """
    norm = total_norm(delta)
    if step == 0:
        return delta, {"scale": torch.ones((), dtype=torch.float64), "mean_norm": norm}
    previous = state["scale"]
    raw = {
        name: previous * vector[name].double()
        + (project(d, vector[name], options.alpha, options.drop_diagonal) if name in linear else d).double()
        for name, d in delta.items()
    }
    mean_norm = state["mean_norm"] + (norm - state["mean_norm"]) / (step + 1)
    size = total_norm(raw)
    # Where nothing was merged yet, or everything cancels, M is 0, which no scale changes.
    scale = size / mean_norm if size > 0 and mean_norm > 0 else torch.ones_like(size)
    return {name: (value / scale).to(delta[name].dtype) for name, value in raw.items()}, {
        "scale": scale,
        "mean_norm": mean_norm,
    }


class Opcm(WeightMethod):
    """New linear weights keep clear of the leading singular directions of what was merged before.

    The whole is rescaled at each step.
    """

    name = "opcm"
    Options = OpcmOptions

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        vector, state = opcm_step(
            *self.vectors(arrival.tuned), self.state, arrival.index, matrices(self.tower), self.options
        )
        return shifted(self.base, vector), state
