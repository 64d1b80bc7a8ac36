"""Truncated decompositions and orthonormal bases, the linear algebra under every method.

All functions are pure, run without autograd and autocast, and decide ranks in float64.
"""

from __future__ import annotations

import math

import torch

#: Singular values below this fraction of the largest one are zero.
NULL_SPACE_TOLERANCE = 1e-6


@torch.no_grad()
def svd_lowrank(M: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading `rank` singular triplets: M [..., m, n] ≈ U diag(S) Vh, in M's dtype.

    Returns:
        U [..., m, r], S [..., r] in falling order and Vh [..., r, n], with r = min(rank, m, n).  Singular values under 1e-6 of the largest
        are exactly zero.  The entry of largest magnitude of every column of U is positive, so the result is unique where S is.

    Raises:
        ValueError: a non-positive rank, or a matrix with non-finite entries.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: expected a positive integer")
    if not M.isfinite().all():
        raise ValueError(f"the matrix {list(M.shape)} has non-finite entries")
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    U, S, Vh = U[..., :rank], S[..., :rank], Vh[..., :rank, :]
    S = torch.where(NULL_SPACE_TOLERANCE * S[..., :1] < S, S, 0.0)
    peak = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    return (U * sign).to(M.dtype), S.to(M.dtype), (Vh * sign.mT).to(M.dtype)


@torch.no_grad()
def factored_svd(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All singular triplets of the product B A without forming it where the factors are thin.

    B [m, R], A [R, n] → U [m, k], S [k], Vh [k, n] in float64, k = min(m, n, R).
    """
    B, A = B.double(), A.double()
    if B.shape[1] >= min(len(B), A.shape[1]):
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        return U, S, Vh
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    return QB @ U, S, Vh @ QA.mT


def effective_rank(singular_values: torch.Tensor) -> int:
    """int(exp(−Σ p ln p)) with p = σ / Σσ and 0 · ln 0 = 0, in float64; 0 where all values are zero."""
    sigma = singular_values.double()
    total = sigma.sum()
    if total == 0:
        return 0
    p = sigma / total
    return int(math.exp(-torch.special.xlogy(p, p).sum().item()))


@torch.no_grad()
def project_out(
    delta: torch.Tensor, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, leading: int, *, drop_diagonal: bool = False
) -> torch.Tensor:
    """Remove from Δ the block that the leading singular directions of another matrix span.

        Δ ← Δ − U_α (U_αᵀ Δ V_α) V_αᵀ

    Args:
        delta: Δ [m, n].
        U, S, Vh: singular triplets of the other matrix, [m, k], [k], [k, n].
        leading: α, how many of them span the block.
        drop_diagonal: remove u_jᵀ Δ v_j for α < j ≤ rank as well, never along numerically null directions.

    Returns:
        [m, n] in Δ's dtype; the products are computed in float64.
    """
    rank = int((S[:1] * max(delta.shape) * torch.finfo(torch.float64).eps < S).sum()) if len(S) else 0
    keep = rank if drop_diagonal else min(leading, len(S))
    U, Vh = U[:, :keep].double(), Vh[:keep].double()
    core = U.mT @ delta.double() @ Vh.mT
    removed = torch.zeros_like(core)
    removed[:leading, :leading] = core[:leading, :leading]
    if drop_diagonal:
        removed.diagonal().copy_(core.diagonal())
    return (delta.double() - U @ removed @ Vh).to(delta.dtype)


@torch.no_grad()
def top_subspace(covariance: torch.Tensor, k: int) -> torch.Tensor:
    """The eigenvectors of the `k` largest eigenvalues of a symmetric matrix [d, d], as columns [d, min(k, d)] in float64.

    Directions without any energy (eigenvalue ≤ 1e-14 of the largest) are left out.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(-1)[:k], vectors.flip(-1)[:, :k]
    return vectors[:, values > 1e-14 * values[:1].clamp_min(0)]


@torch.no_grad()
def extend_basis(U: torch.Tensor, new: torch.Tensor, *, tol: float = 1e-8) -> torch.Tensor:
    """An orthonormal basis of span([U | new]) that begins with U, revealing the rank.

    Gram–Schmidt, column by column: where nothing is dropped, the columns are those of a QR factorisation up to sign.  Their order and
    direction matter, because the relaxed projector keeps one interference value per column.

    Args:
        U: orthonormal columns [d, K]; K = 0 starts a basis.
        new: further directions [d, k].
        tol: a column of `new` of which, scaled to length one, less than `tol` of the squared length lies outside the span so far is
            dropped.  (A plain QR would keep it as a column of noise.)

    Returns:
        [d, K'] in U's dtype, K ≤ K' ≤ min(K + k, d); the first K columns are U's own bits.
    """
    basis = U.double()
    for column in new.double().unbind(1):
        column = column / column.norm().clamp_min(torch.finfo(torch.float64).tiny)
        for _ in range(2):  # twice is enough: once leaves rounding errors of the order of the removed part
            column = column - basis @ (basis.mT @ column)
        if column.square().sum() > tol and basis.shape[1] < len(basis):
            basis = torch.cat([basis, (column / column.norm()).unsqueeze(1)], 1)
    return torch.cat([U, basis[:, U.shape[1] :].to(U.dtype)], 1)
