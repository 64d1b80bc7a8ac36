"""The whole spectrum of a matrix, and taking the directions it spans out of another one.

Exact, because a sketch misjudges the effective rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import torch
from torch import Tensor

from mingle.kernels.dtypes import wide
from mingle.linalg.arithmetic import NOISE, falling_eigh, gram, ieee, product
from mingle.ops import small_factorizations as small
from mingle.ops.checks import check_together

#: Pivots of a Cholesky factor under this fraction of the largest, squared, ask for an eigen-decomposition
#: instead.
_DEPENDENT = 1e-12
#: From this share of the shorter side on, as many factors are decomposed as the product they make.
_DENSE_SHARE = 0.7


@ieee
def gram_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets of M [..., m, n], in float64, from the smaller of its two Gram matrices.

    Returns:
        U [..., m, k], S [..., k] in falling order, Vh [..., k, n] with k = min(m, n).  Values under 1e-7 of
        the largest are noise of this method: they and their directions on the longer side are set to zero.
    """
    M = M.double()
    if M.shape[-2] > M.shape[-1]:
        V, S, Uh = gram_svd(M.mT)
        return Uh.mT, S, V.mT
    S, U, inverse = _roots(gram(M))
    return U, S, (U.mT @ M).mul_(inverse.unsqueeze(-1))


@ieee
def remover(
    blocks: Iterable[tuple[Tensor, Tensor]], leading: Callable[[Tensor], int], *, drop_diagonal: bool = False
) -> Tensor:
    """What takes the block out of Δ that the leading singular directions of M span: Δ − M K is without it.

        MᵀM = V Σ² Vᵀ;   K = V Σ⁻¹ R Vᵀ,  where R has those entries of UᵀΔV = Σ⁻¹ Vᵀ (MᵀΔ) V that are removed

    Neither matrix is ever there as a whole, nor is any of U.

    Args:
        blocks: of M and Δ the same rows [b, n], block after block; together at least n of them.
        leading: how many directions span the block, from the singular values [n] in falling order.
        drop_diagonal: see `project_out`.

    Returns:
        K [n, n], in float64.  Directions that `gram_svd` takes for noise have no part in it.
    """
    squared = crossed = torch.zeros((), dtype=torch.float64)
    for merged, delta in blocks:
        exact = merged.double()
        squared = squared + exact.mT @ exact
        crossed = crossed + exact.mT @ delta.double()
    S, V, inverse = _roots(squared)
    count = leading(S)
    if not drop_diagonal:
        S, V, inverse = S[:count], V[:, :count], inverse[:count]
    down = V * inverse  # M down = U
    removed = down.mT @ (crossed @ V)
    if drop_diagonal:
        diagonal = removed.diagonal().clone()
        removed[count:] = removed[:, count:] = 0
        removed.diagonal().copy_(diagonal)
    return (down @ removed) @ V.mT


@ieee
def factored_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets of the product B A, without forming it where the factors are thin.

        BᵀB = F Fᵀ,  H = Fᵀ A,  H Hᵀ = Y S² Yᵀ;   U = B F⁻ᵀ Y,  Vᵀ = S⁻¹ Yᵀ H

    Args:
        B: [..., m, R].
        A: [..., R, n].

    Returns:
        U [..., m, k], S [..., k] in falling order, Vh [..., k, n] in float64, with k = min(m, n, R); see
        `gram_svd` for values near zero.

    Raises:
        ValueError: factors that cannot be multiplied.
        TypeError: factors of integers, or on different devices.
    """
    check_together({"B": B, "A": A})
    if B.dim() < 2 or A.dim() < 2 or B.shape[-1] != A.shape[-2]:
        raise ValueError(f"B {list(B.shape)} and A {list(A.shape)}: expected [..., m, R] and [..., R, n]")
    B, A = B.double(), A.double()
    shorter, R = min(B.shape[-2], A.shape[-1]), B.shape[-1]
    if _DENSE_SHARE * shorter <= R:
        U, S, Vh = gram_svd(B @ A)
        return U[..., :R], S[..., :R], Vh[..., :R, :]
    F, F_inverse = _square_root(gram(B.mT))
    H = F.mT @ A
    S, Y, inverse = _roots(gram(H))
    return B @ (F_inverse.mT @ Y), S, inverse.unsqueeze(-1) * (Y.mT @ H)


def _roots(squared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ [..., k] in falling order, eigenvectors [..., k, k] and 1/σ of G = W σ² Wᵀ; both are 0 for noise."""
    values, vectors = falling_eigh(squared)
    real = values > NOISE * values[..., :1].clamp_min(0)
    sigma = torch.where(real, values, 0.0).sqrt()
    return sigma, vectors, torch.where(real, 1 / sigma, 0.0)


def _square_root(squared: Tensor) -> tuple[Tensor, Tensor]:
    """F and F⁻¹ with F Fᵀ = G [..., k, k], by Cholesky.

    Where rows depend on each other, F is made of eigenvectors instead, with a pseudo-inverse.
    """
    L, info = torch.linalg.cholesky_ex(squared)
    pivots = L.diagonal(0, -2, -1).square()
    if (info == 0).all() and (pivots > _DEPENDENT * pivots.amax(-1, keepdim=True)).all():
        identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        return L, torch.linalg.solve_triangular(L, identity, upper=False)
    values, vectors = torch.linalg.eigh(squared)
    root = torch.where(values > _DEPENDENT * values[..., -1:], values, 0.0).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    return vectors * root.unsqueeze(-2), inverse.unsqueeze(-1) * vectors.mT


def effective_rank(singular_values: Tensor) -> int:
    """int(exp(−Σ p ln p)) in float64 with p = σ / Σσ and 0 · ln 0 = 0, for σ [k]; 0 where all are zero."""
    return int(effective_ranks(singular_values))


def effective_ranks(singular_values: Tensor) -> Tensor:
    """`effective_rank` for each row of σ [..., k]: int32 [...], without waiting for a GPU."""
    *leading, k = singular_values.shape
    return small.effective_rank(singular_values.double().reshape(prod(leading), k)).view(leading)


@ieee
def project_out(
    delta: Tensor, U: Tensor, S: Tensor, Vh: Tensor, leading: int | Tensor, *, drop_diagonal: bool = False
) -> Tensor:
    """Remove from Δ the block that the leading singular directions of another matrix span.

        Δ ← Δ − U_α (U_αᵀ Δ V_α) V_αᵀ

    Args:
        delta: Δ [..., m, n].
        U, S, Vh: singular triplets of the other matrix, [..., m, k], [..., k], [..., k, n].
        leading: α, how many of them span the block; for a batch one number or an integer tensor [...].
        drop_diagonal: remove u_jᵀ Δ v_j for α < j ≤ rank as well, never along numerically null directions.

    Returns:
        [..., m, n] in Δ's dtype, which the products run in, or in float32 for shorter ones.

    Raises:
        TypeError: tensors of integers, or on different devices.
    """
    check_together({"delta": delta, "U": U, "S": S, "Vh": Vh})
    if isinstance(leading, int) and not drop_diagonal:
        U, S, Vh = U[..., :leading], S[..., :leading], Vh[..., :leading, :]
    dtype = wide(delta)
    exact, U, Vh = delta.to(dtype), U.to(dtype), Vh.to(dtype)
    core = product(product(U.mT, exact), Vh.mT)
    count = torch.as_tensor(leading, device=S.device).unsqueeze(-1)
    inside = torch.arange(S.shape[-1], device=S.device) < count
    removed = torch.where(inside.unsqueeze(-1) & inside.unsqueeze(-2), core, 0)
    if drop_diagonal:
        real = S[..., :1] * max(delta.shape[-2:]) * torch.finfo(torch.float64).eps < S
        removed.diagonal(0, -2, -1).copy_(torch.where(real, core.diagonal(0, -2, -1), 0))
    return (exact - product(product(U, removed), Vh)).to(delta.dtype)
