"""Orthonormal bases: of a whole block at once by Cholesky QR, and of a growing span column by column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mingle.linalg.arithmetic import gram, ieee, product
from mingle.linalg.sketch import gaussian
from mingle.ops import small_factorizations as small
from mingle.ops.checks import check_together

_UNIT_ROUNDOFF = 2.0**-53
#: Rows further from orthonormal than this, in float64, are not; 1e-15 is usual.
ORTHONORMAL = 1e-10


def orthonormalized(rows: Tensor) -> Tensor:
    """The rows of Y [..., k, n] made orthonormal in their order by one round of Cholesky QR.

        Y Yᵀ = LLᵀ in float64,  Q = L⁻¹ Y

    One round leaves an error of κ(Y)² u; ill-conditioned rows need two, dependent ones three (shifted
    Cholesky QR, Fukaya et al. 2020).  Zero rows stay zero.
    """
    k, n = rows.shape[-2:]
    squared = gram(rows).view(-1, k, k)
    upper, _ = small.cholesky_inverse(squared, 11 * (n * k + k * (k + 1)) * _UNIT_ROUNDOFF, rows.dtype)
    return product(upper.view(*rows.shape[:-1], k).mT, rows)


def orthonormal(rows: Tensor, seed: int, keys: Sequence[str | int]) -> Tensor:
    """An orthonormal set [..., k, n], k ≤ n, whose span holds the rows of Y; what they leave open is random.

    Args:
        rows: Y [..., k, n], of any condition and rank.
        seed, keys: of the random rows, one key per matrix.
    """
    for _ in range(2):
        rows = orthonormalized(orthonormalized(rows))
        if not rows.is_cuda and (defect(rows) <= ORTHONORMAL).all():  # looking would wait for a GPU
            return rows
    missing = rows.square().sum(-1, keepdim=True) < 0.25
    k, n = rows.shape[-2:]
    spare = gaussian(seed, [f"spare {key}" for key in keys], k, n, rows.device, rows.dtype) * n**-0.5
    return orthonormalized(orthonormalized(torch.where(missing, spare.view(rows.shape), rows)))


def defect(rows: Tensor) -> Tensor:
    """max |Q Qᵀ − I| over each [k, n] of `rows`, float64 [...]; NaN where an entry is."""
    k = rows.shape[-2]
    return (gram(rows) - torch.eye(k, dtype=torch.float64, device=rows.device)).abs().amax((-2, -1))


@ieee
def extend_basis(U: Tensor, new: Tensor, *, tol: float = 1e-8) -> Tensor:
    """An orthonormal basis of span([U | new]) that begins with U, revealing the rank.

    Gram–Schmidt, column by column: where nothing is dropped, the columns are those of a QR factorisation up
    to sign.  Their order and direction matter, because the relaxed projector keeps one interference value per
    column.

    Args:
        U: orthonormal columns [d, K]; K = 0 starts a basis.
        new: further directions [d, k].
        tol: a column of `new` is dropped where less than this share of its squared length lies outside the
            span so far.  (A plain QR would keep it as a column of noise.)

    Returns:
        [d, K'] in U's dtype, K ≤ K' ≤ min(K + k, d); the first K columns are U's own bits.

    Raises:
        ValueError: two tensors that are not matrices of the same height.
        TypeError: tensors of integers, or on different devices.
    """
    check_together({"U": U, "new": new})
    if U.dim() != 2 or new.dim() != 2 or len(U) != len(new):
        raise ValueError(f"U {list(U.shape)} and new {list(new.shape)}: expected [d, K] and [d, k]")
    basis = U.double()
    for column in new.double().unbind(1):
        column = column / column.norm().clamp_min(torch.finfo(torch.float64).tiny)
        for _ in range(2):  # twice is enough: once leaves rounding errors of the order of the removed part
            column = column - basis @ (basis.mT @ column)
        if column.square().sum() > tol and basis.shape[1] < len(basis):
            basis = torch.cat([basis, (column / column.norm()).unsqueeze(1)], 1)
    return torch.cat([U, basis[:, U.shape[1] :].to(U.dtype)], 1)
