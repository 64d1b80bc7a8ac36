"""TSV-M: task singular vectors, made orthogonal and added up (Gargiulo et al., arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mingle import linalg
from mingle.methods.base import Tensors
from mingle.methods.matrixwise import MatrixMethod

#: the parts of a decomposition, as the running state names them
_PARTS = ("U", "S", "Vh")


@dataclass(frozen=True)
class TsvMOptions:
    """Settings of TSV-M.

    Attributes:
        scaling: α, the merged task vector's weight.
    """

    scaling: float = 1.0


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
    P, D, Qh = linalg.gram_svd(vectors)
    return (P * (D > 0)).to(vectors.dtype) @ Qh.to(vectors.dtype)


class TsvM(MatrixMethod):
    """Of T tasks, each keeps the leading min(m, n) / T singular triplets of its Δ; see `whitened`.

    The triplets that T tasks keep are among those that T − 1 did.  So after every arrival the result is that
    of all models at once, and what is kept is never more than one decomposition of each matrix.
    """

    name = "tsv-m"
    Options = TsvMOptions

    @staticmethod
    def kept_numbers(m: int, n: int) -> int:
        return (m + n + 1) * min(m, n)

    def merge(self, deltas: Tensors, roundings: Mapping[str, float], index: int) -> tuple[Tensors, Tensors]:
        merged: Tensors = {}
        state: Tensors = {}
        for name, delta in deltas.items():
            triplets = self._triplets(name, delta, roundings[name], index)
            merged[name] = whitened(*triplets)
            state |= {f"{part}/{name}": tensor for part, tensor in zip(_PARTS, triplets, strict=True)}
        return merged, state

    def _triplets(
        self, name: str, delta: Tensor, rounding: float, index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U [m, R], S [R] and Vh [R, n] of all tasks, oldest first."""
        keep = max(1, min(delta.shape) // (index + 1))
        U, S, Vh = linalg.svd_lowrank(delta, keep, keys=[name])
        S = torch.where(rounding < S, S, 0)
        if not index:
            return U, S, Vh
        U_old, S_old, Vh_old = (self.state[f"{part}/{name}"] for part in _PARTS)
        # of every task's triplets, side by side, the leading ones
        U_old = U_old.unflatten(1, (index, -1))[:, :, :keep].flatten(1)
        S_old = S_old.unflatten(0, (index, -1))[:, :keep].flatten()
        Vh_old = Vh_old.unflatten(0, (index, -1))[:, :keep].flatten(0, 1)
        return torch.cat([U_old, U], 1), torch.cat([S_old, S]), torch.cat([Vh_old, Vh])
