"""Block subspace iteration: the leading singular triplets of a matrix, and how well they have converged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mingle.linalg.arithmetic import falling_eigh, gram, product
from mingle.linalg.basis import orthonormal, orthonormalized
from mingle.linalg.sketch import gaussian
from mingle.ops import small_factorizations as small

Triplets = tuple[Tensor, Tensor, Tensor]

#: Singular values below this fraction of the largest one are zero.
NULL_SPACE_TOLERANCE = 1e-6
#: Up to this width a library decomposes whole batches at once, and nothing else is faster.
_SMALL = 32


@dataclass(frozen=True)
class Iteration:
    """What one decomposition is asked for; `block` is the number ℓ of vectors that iterate."""

    rank: int
    block: int
    power_iters: int
    seed: int


class Found(NamedTuple):
    """Triplets in float64, their residual norms [..., r], and σ_ℓ [...]; both 0 where they are exact."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    beyond: Tensor

    @staticmethod
    def exactly(U: Tensor, S: Tensor, Vh: Tensor) -> Found:
        return Found(U, S, Vh, torch.zeros_like(S), S.new_zeros(S.shape[:-1]))

    @property
    def transposed(self) -> Found:
        return self._replace(U=self.Vh.mT, Vh=self.U.mT)


def full(M: Tensor, rank: int) -> Found:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return Found.exactly(U[..., :rank], S[..., :rank], Vh[..., :rank, :])


def leading(scaled: Tensor, M: Tensor, plan: Iteration, keys: list[str]) -> Found:
    """The triplets, in float64, of a matrix or a batch M [..., m, n] in float64; `scaled` is M in fp32."""
    m, n = M.shape[-2:]
    if min(m, n) <= _SMALL:
        return full(M, plan.rank)
    if m < n:
        return leading(scaled.mT, M.mT, plan, keys).transposed
    r, block = min(plan.rank, n), min(plan.block, n)
    if 2 * block >= n:
        rows = falling_eigh(gram(M.mT))[1][..., :r].mT  # [..., r, n]
        S, rows, images = _triplets(rows, product(rows, M.mT), plan, keys)
        return Found.exactly(images.mT, S, rows)
    P = gaussian(plan.seed, keys, block, n, M.device, torch.float32).view(*M.shape[:-2], block, n)
    square = product(scaled.mT, scaled) if on_gram_side(m, n, block, plan.power_iters) else None
    for _ in range(plan.power_iters):
        P = product(product(P, scaled.mT), scaled) if square is None else product(P, square)
        P = orthonormalized(P)
    Q = orthonormal(product(P.double(), M.mT), plan.seed, keys)  # [..., ℓ, m]
    C = product(Q, M)  # [..., ℓ, n]
    W, beyond = _leading_eigenvectors(gram(C), r)
    S, rows, images = _triplets(product(W, Q), product(W, C), plan, keys)
    residuals = product(images.to(scaled.dtype), scaled.mT).double() - S.unsqueeze(-1) * rows  # [..., r, m]
    return Found(rows.mT, S, images, residuals.norm(dim=-1), beyond)


def on_gram_side(m: int, n: int, block: int, power_iters: int) -> bool:
    """Whether to iterate with MᵀM [n, n], for M [m, n] and m ≥ n: where M is tall and that is cheaper.

    m n² + q n² ℓ against 2 q m n ℓ multiply-adds.  Squares in fp32 lose the directions under 3e-4 of the
    largest, which a square matrix should not risk for little.
    """
    return m >= 2 * n and n * (m + power_iters * block) < 2 * power_iters * m * block


def _leading_eigenvectors(squared: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors of the r largest eigenvalues of G [..., k, k] as rows [..., r, k].

    And the root of the smallest eigenvalue [...].
    """
    k = squared.shape[-1]
    values, vectors, _ = small.eigh(squared.view(-1, k, k))
    smallest = values[:, -1].clamp_min(0).sqrt().view(squared.shape[:-2])
    return vectors.view(squared.shape)[..., :r].mT, smallest


def _triplets(rows: Tensor, images: Tensor, plan: Iteration, keys: list[str]) -> Triplets:
    """S in falling order, and in that order the rows and their images at unit length.

    From orthonormal rows [..., r, k] and their images [..., r, l] under the matrix.  The lengths are accurate
    where the eigenvalues, their squares, have drowned in rounding errors.
    """
    S, order = images.norm(dim=-1).sort(dim=-1, descending=True, stable=True)
    rows, images = (part.take_along_dim(order.unsqueeze(-1), -2) for part in (rows, images))
    units = torch.where(NULL_SPACE_TOLERANCE * S[..., :1] < S, 1 / S, 0.0).unsqueeze(-1) * images
    return S, rows, orthonormal(units, plan.seed, keys)
