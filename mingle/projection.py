"""From a task vector to an expert: keep clear of what earlier experts do, then keep the leading directions (MINGLE Eqs. 3–4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mingle import linalg
from mingle.layers import LowRankExpert


def project_out_experts(delta: torch.Tensor, experts: Sequence[LowRankExpert], *, drop_diagonal: bool = False) -> torch.Tensor:
    """Δ without the block of the effective-rank leading singular directions of Σ_i B_i A_i.

    Args:
        delta: Δ [d_out, d_in].
        experts: those of the earlier tasks; none leaves Δ as it is.
        drop_diagonal: see `mingle.linalg.project_out`.  The paper's formula has it, its published numbers do not.
    """
    if not experts:
        return delta
    B = torch.cat([expert.B for expert in experts], 1)
    A = torch.cat([expert.A for expert in experts], 0)
    U, S, Vh = linalg.factored_svd(B, A)
    return linalg.project_out(delta, U, S, Vh, linalg.effective_rank(S), drop_diagonal=drop_diagonal)


def make_expert(delta: torch.Tensor, earlier: Sequence[LowRankExpert], rank: int, *, drop_diagonal: bool = False) -> LowRankExpert:
    """The rank-`rank` expert of a task: Δ, projected, ≈ Ũ Σ̃ Ṽᵀ with B = Ũ [d_out, r] and A = Σ̃ Ṽᵀ [r, d_in]."""
    return LowRankExpert.from_dense(project_out_experts(delta, earlier, drop_diagonal=drop_diagonal), rank)
