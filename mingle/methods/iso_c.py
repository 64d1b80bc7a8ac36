"""Iso-C: the summed task vectors with an isotropic spectrum (Marczak et al., arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mingle import linalg
from mingle.methods.matrixwise import Change, MatrixMethod


def isotropic(total: Tensor, rounding: float = 0.0) -> Tensor:
    """σ̄ U Vᵀ [m, n], with U Σ Vᵀ the singular value decomposition of `total` and σ̄ the mean of Σ.

    Directions that are not in `total` stay out: where its rank is less than min(m, n), σ̄ is the mean over
    those that are.

    Args:
        total: [m, n].
        rounding: singular values up to this one count as 0, as do those under 1e-6 of the largest.
    """
    U, S, Vh = linalg.gram_svd(total)
    real = (linalg.NULL_SPACE_TOLERANCE * S[0]).clamp_min(rounding) < S
    if not real.any():
        return total
    return (S[real].mean() * U[:, real] @ Vh[real]).to(total.dtype)


class IsoC(MatrixMethod):
    """M = σ̄ U Vᵀ of the sum of all task vectors, which is all that is kept of them; see `isotropic`."""

    name = "iso-c"
    parts = ("sum",)

    @staticmethod
    def kept_numbers(m: int, n: int) -> int:
        return m * n

    def work_numbers(self, m: int, n: int) -> int:
        return 3 * m * n + 8 * min(m, n) ** 2

    def merge(self, change: Change, seen: int, kept: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        total = change.delta + kept[0] if seen else change.delta
        # independent errors of as many weights as were added up
        return isotropic(total, (seen + 1) ** 0.5 * change.rounding), (total,)
