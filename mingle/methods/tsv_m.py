"""TSV-M: task singular vectors, made orthogonal and added up (Gargiulo et al., arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mingle import linalg
from mingle.methods.matrixwise import Change, MatrixMethod


def whitened(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """U⊥ diag(S) V⊥ᵀ [m, n]: the tasks' singular vectors, side by side, as orthogonal as they can be made.

    U⊥ is the matrix with orthonormal columns that is closest to U, and V⊥ to V.  Where vectors depend on each
    other, or are 0, they are orthonormal on what they span.

    Args:
        U: [m, R].
        S: [R]; where it is 0, the vectors take no part.
        Vh: [R, n].
    """
    real = S > 0
    return (_orthogonal(U[:, real]) * S[real]) @ _orthogonal(Vh[real])


def _orthogonal(vectors: Tensor) -> Tensor:
    """P Qᵀ of the singular value decomposition P D Qᵀ."""
    P, _, Qh = linalg.gram_svd(vectors)  # where D is 0, one of them is
    return P.to(vectors.dtype) @ Qh.to(vectors.dtype)


class TsvM(MatrixMethod):
    """Of T tasks, each keeps the leading min(m, n) / T singular triplets of its Δ; see `whitened`.

    The triplets that T tasks keep are among those that T − 1 did.  So after every arrival the result is that
    of all models at once, and what is kept is never more than one decomposition of each matrix.
    """

    name = "tsv-m"
    parts = ("U", "S", "Vh")

    @staticmethod
    def kept_numbers(m: int, n: int) -> int:
        return (m + n + 1) * min(m, n)

    def work_numbers(self, m: int, n: int) -> int:
        return 7 * m * n + 10 * min(m, n) ** 2

    def merge(self, change: Change, seen: int, kept: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        count = max(1, min(change.delta.shape) // (seen + 1))
        U, S, Vh = linalg.svd_lowrank(change.delta, count, keys=[change.name])
        S = torch.where(change.rounding < S, S, 0)
        if seen:
            # of every earlier task's triplets, side by side, the leading ones
            old_U, old_S, old_Vh = kept
            U = torch.cat([old_U.unflatten(1, (seen, -1))[:, :, :count].flatten(1), U], 1)
            S = torch.cat([old_S.unflatten(0, (seen, -1))[:, :count].flatten(), S])
            Vh = torch.cat([old_Vh.unflatten(0, (seen, -1))[:, :count].flatten(0, 1), Vh])
        return whitened(U, S, Vh), (U, S, Vh)
