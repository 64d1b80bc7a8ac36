"""`LowRankExpert`: the two factors of what one task changes in a linear layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mingle import linalg


class LowRankExpert(NamedTuple):
    """The low-rank update B A of one task: A [r, d_in], B [d_out, r]."""

    A: torch.Tensor
    B: torch.Tensor

    def delta(self) -> torch.Tensor:
        """The dense update [d_out, d_in]."""
        return self.B @ self.A

    @classmethod
    def from_dense(cls, delta: torch.Tensor, rank: int) -> LowRankExpert:
        """The best rank-`rank` approximation of a dense update: Δ ≈ U Σ Vᵀ with B = U and A = Σ Vᵀ.

        Args:
            delta: Δ [d_out, d_in], of any floating dtype, which is that of the factors; decomposed in
                float64.
            rank: r; at most min(d_out, d_in) is used.

        Raises:
            ValueError: a Δ that is not a floating-point matrix or has non-finite entries, or a rank that is
                not positive.
        """
        if delta.dim() != 2 or not delta.is_floating_point():
            raise ValueError(
                f"delta has shape {list(delta.shape)} and dtype {delta.dtype}; "
                "expected a floating-point [d_out, d_in]"
            )
        U, S, Vh = linalg.svd_lowrank(delta, rank)
        return cls(A=S.unsqueeze(-1) * Vh, B=U)
