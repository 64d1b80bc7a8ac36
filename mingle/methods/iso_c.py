"""Iso-C: the summed task vectors with an isotropic spectrum (Marczak et al., arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mingle import linalg
from mingle.methods.base import Tensors
from mingle.methods.matrixwise import MatrixMethod


@dataclass(frozen=True)
class IsoCOptions:
    """Settings of Iso-C.

    Attributes:
        scaling: α, the merged task vector's weight.
    """

    scaling: float = 1.0


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
    Options = IsoCOptions

    @staticmethod
    def kept_numbers(m: int, n: int) -> int:
        return m * n

    def merge(self, deltas: Tensors, roundings: Mapping[str, float], index: int) -> tuple[Tensors, Tensors]:
        totals = {
            f"sum/{name}": delta + self.state[f"sum/{name}"] if index else delta
            for name, delta in deltas.items()
        }
        # independent errors of as many weights as were added up
        growth = (index + 1) ** 0.5
        return {name: isotropic(totals[f"sum/{name}"], growth * roundings[name]) for name in deltas}, totals
