"""Truncated singular value decompositions of many matrices, by block subspace iteration.

It runs in the matrices' own precision and is finished in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from mingle.kernels.dtypes import wide
from mingle.linalg.arithmetic import buckets, falling_eigh, gram, ieee, product
from mingle.linalg.basis import ORTHONORMAL, defect, orthonormal, orthonormalized
from mingle.linalg.sketch import gaussian
from mingle.ops import extension, small_kernels
from mingle.ops import small_factorizations as small

logger = logging.getLogger(__name__)

Triplets = tuple[Tensor, Tensor, Tensor]

#: Singular values below this fraction of the largest one are zero.
NULL_SPACE_TOLERANCE = 1e-6
BACKENDS = ("auto", "lapack", "library", "extension")
#: mode → (oversample, power_iters): an excess residual under 1e-5 and under 1e-4 on every spectrum tried.
#: Eight rounds would do for the former, but where the singular values around r are close together they leave
#: an error of 1e-4 in B A; ten, at 4 to 14 % more time, 2e-5.
MODES = {"accurate": (64, 10), "fast": (32, 7)}

#: Up to this width a library decomposes whole batches at once, and nothing else is faster.
_SMALL = 32


@dataclass(frozen=True)
class _Iteration:
    """What one decomposition is asked for; `block` is the number ℓ of vectors that iterate."""

    rank: int
    block: int
    power_iters: int
    seed: int


@overload
def svd_lowrank(
    M: Tensor, rank: int, *, mode: str = ..., oversample: int | None = ..., power_iters: int | None = ...,
    seed: int = ..., keys: Sequence[str | int] | None = ..., backend: str = ...,
) -> Triplets: ...  # fmt: skip
@overload
def svd_lowrank(
    M: Sequence[Tensor], rank: int, *, mode: str = ..., oversample: int | None = ...,
    power_iters: int | None = ..., seed: int = ..., keys: Sequence[str | int] | None = ...,
    backend: str = ...,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]: ...  # fmt: skip
def svd_lowrank(
    M: Tensor | Sequence[Tensor],
    rank: int,
    *,
    mode: str = "accurate",
    oversample: int | None = None,
    power_iters: int | None = None,
    seed: int = 0,
    keys: Sequence[str | int] | None = None,
    backend: str = "auto",
) -> Triplets | tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The leading singular triplets M ≈ U diag(S) Vh of one matrix, a batch, or a list of any shapes.

    Block subspace iteration (Halko, Martinsson and Tropp, SIAM Review 53, 2011) with ℓ = rank + oversample
    vectors, orthonormalised by Cholesky QR with Gram matrices in float64.  fp32 matrices iterate in fp32 and
    finish with one round in float64; where one side is much longer than the other, the iteration runs on the
    Gram matrix of the shorter one.  Where ℓ reaches half the shorter side the Gram matrix is decomposed
    exactly.

    Args:
        M: [..., m, n], or a sequence of [m, n], in a floating dtype.
        rank: r; at most min(m, n) triplets are returned.
        mode: ``"accurate"``, whose residual exceeds the optimal one by less than a factor 1 + 1e-5, or
            ``"fast"`` with 1 + 1e-4.  Of a task vector the leading part B A itself was within 1e-4 wherever
            tried, singular values a thousandth apart around r included.
        oversample, power_iters: vectors beyond the rank, and applications of MᵀM in the iteration; they
            overrule `mode`.
        seed: of the random start.
        keys: one name per matrix, which its random start depends on and errors mention.  Without keys all
            start alike.  The result for a matrix depends on neither the batch it is in nor its place there,
            beyond a GPU library's own choice of kernels.
        backend: ``"lapack"`` decomposes fully in float64; ``"library"`` iterates with PyTorch's own small
            factorisations, ``"extension"`` with the CUDA kernels of ``mingle._C``; ``"auto"`` iterates with
            what there is.

    Returns:
        U [..., m, r] and Vh [..., r, n], both orthonormal, and S [..., r] in falling order, in M's dtype; for
        a sequence three lists.  Singular values under 1e-6 of the largest are exactly zero.  The entry of
        largest magnitude in every column of U is positive, so the result is unique where S is.

    Raises:
        ValueError: a non-positive rank, an unknown mode or backend, or a matrix with non-finite entries,
            named by its key.
        TypeError: a tensor that is not a floating-point matrix.
        RuntimeError: ``backend="extension"`` where it cannot run; the message says why.
    """
    matrices = [M] if isinstance(M, Tensor) else list(M)
    preset = MODES.get(mode, MODES["accurate"])
    oversample = preset[0] if oversample is None else oversample
    power_iters = preset[1] if power_iters is None else power_iters
    _check(M, rank, mode, oversample, power_iters, backend)
    count = M.shape[:-2].numel() if isinstance(M, Tensor) else len(matrices)
    names = _names(keys, count)
    plan = _Iteration(rank, rank + oversample, power_iters, seed)
    if isinstance(M, Tensor):
        U, S, Vh = _apply(M.reshape(count, *M.shape[-2:]), names, plan, backend)
        return (
            U.view(*M.shape[:-2], *U.shape[1:]),
            S.view(*M.shape[:-2], S.shape[1]),
            Vh.view(*M.shape[:-2], *Vh.shape[1:]),
        )
    results: list[Triplets] = [()] * len(matrices)  # type: ignore[list-item]
    for places in buckets(matrices):
        together = torch.stack([matrices[i] for i in places])
        parts = _apply(together, [names[i] for i in places], plan, backend)
        for i, U, S, Vh in zip(places, *parts, strict=True):
            results[i] = (U, S, Vh)
    return [U for U, _, _ in results], [S for _, S, _ in results], [Vh for _, _, Vh in results]


def _check(
    M: Tensor | Sequence[Tensor], rank: int, mode: str, oversample: int, power_iters: int, backend: str
) -> None:
    if rank < 1:
        raise ValueError(f"rank={rank}: expected a positive integer")
    if oversample < 0 or power_iters < 0:
        raise ValueError(f"oversample={oversample}, power_iters={power_iters}: expected values >= 0")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    single = isinstance(M, Tensor)
    for matrix in [M] if isinstance(M, Tensor) else M:
        if matrix.dim() < 2 or (matrix.dim() > 2 and not single) or not matrix.is_floating_point():
            expected = "[..., m, n]" if single else "[m, n] for every entry of a list"
            raise TypeError(
                f"M has shape {list(matrix.shape)} and dtype {matrix.dtype}; "
                f"expected a floating-point {expected}"
            )
        if backend == "extension" and (reason := _without_extension(matrix, rank + oversample)):
            raise RuntimeError(f"backend='extension' cannot run: {reason}")


def _without_extension(matrix: Tensor, block: int) -> str | None:
    """Why the kernels of ``mingle._C`` cannot serve; None where they can."""
    if block > small_kernels.MAX_SIZE:
        return f"its kernels take rank + oversample up to {small_kernels.MAX_SIZE}, not {block}"
    return extension.why_not(matrix.device)


def _names(keys: Sequence[str | int] | None, count: int) -> list[str]:
    """One key per matrix; the same for all where none are given, as a place in a batch must not matter."""
    if keys is None:
        return [""] * count
    if len(keys) != count:
        raise ValueError(f"{len(keys)} keys for {count} matrices")
    return [str(key) for key in keys]


@ieee
def _svd_lowrank(
    M: Tensor, rank: int, block: int, power_iters: int, seed: int, backend: str, names: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`svd_lowrank` of M [b, m, n] with `block` = ℓ vectors; `names` has one key per matrix, a line each."""
    keys = names.split("\n")
    b, m, n = M.shape
    plan = _Iteration(rank, block, power_iters, seed)
    if M.numel() == 0:
        r = min(rank, m, n)
        return M.new_empty(b, m, r), M.new_empty(b, r), M.new_empty(b, r, n)
    scaled, exponent, *nonfinite = small.rescale(M.to(wide(M)))
    _refuse_nonfinite(M, keys, *nonfinite)
    exact = torch.ldexp(M, -exponent[:, None, None]) if M.dtype == torch.float64 else scaled.double()
    if backend == "lapack":
        parts = _full(exact, plan.rank)
    elif M.device.type == "cpu":
        singles = [_leading(scaled[i], exact[i], plan, keys[i : i + 1]) for i in range(b)]
        parts = tuple(map(torch.stack, zip(*singles, strict=True)))  # type: ignore[assignment]
    else:
        with small_kernels.set_aside() if backend == "library" else nullcontext():
            parts = _leading(scaled, exact, plan, keys)
    if backend != "lapack":
        parts = _repaired(parts, exact, plan, keys)
    U, S, Vh = parts
    S = torch.ldexp(torch.where(NULL_SPACE_TOLERANCE * S[:, :1] < S, S, 0.0), exponent[:, None])
    U, Vh = U.to(wide(M)), Vh.to(wide(M))
    small.fix_signs_(U, Vh)
    return U.to(M.dtype), S.to(M.dtype), Vh.to(M.dtype)


_registered = torch.library.custom_op("mingle::svd_lowrank", _svd_lowrank, mutates_args=())


@_registered.register_fake
def _(
    M: Tensor, rank: int, block: int, power_iters: int, seed: int, backend: str, names: str
) -> tuple[Tensor, Tensor, Tensor]:
    b, m, n = M.shape
    r = min(rank, m, n)
    return M.new_empty(b, m, r), M.new_empty(b, r), M.new_empty(b, r, n)


def _apply(M: Tensor, keys: list[str], plan: _Iteration, backend: str) -> Triplets:
    operator = _registered if torch.compiler.is_compiling() else _svd_lowrank
    return operator(M, plan.rank, plan.block, plan.power_iters, plan.seed, backend, "\n".join(keys))


def _refuse_nonfinite(M: Tensor, keys: list[str], count: Tensor, first: Tensor) -> None:
    for i, (wrong, place) in enumerate(zip(count.tolist(), first.tolist(), strict=True)):
        if wrong:
            name = repr(keys[i]) if keys[i] != "" else f"{i} of {len(M)}"
            entry = list(divmod(place, M.shape[2]))
            raise ValueError(
                f"matrix {name} {list(M.shape[1:])} has non-finite entries: {wrong}, the first at {entry}"
            )


def _full(M: Tensor, rank: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def _repaired(parts: Triplets, M: Tensor, plan: _Iteration, keys: list[str]) -> Triplets:
    """`parts` with LAPACK's result wherever the iteration did not end in orthonormal vectors."""
    U, S, Vh = parts
    trust = (defect(U.mT) <= ORTHONORMAL) & (defect(Vh) <= ORTHONORMAL) & S.isfinite().all(-1)
    for i in (~trust).nonzero().flatten().tolist():
        logger.warning(
            "the subspace iteration failed for matrix %r %s; decomposed fully instead",
            keys[i] or i,
            list(M.shape[1:]),
        )
        U[i], S[i], Vh[i] = _full(M[i], plan.rank)
    return U, S, Vh


def _leading(scaled: Tensor, M: Tensor, plan: _Iteration, keys: list[str]) -> Triplets:
    """The triplets, in float64, of a matrix or a batch M [..., m, n] in float64; `scaled` is M in fp32."""
    m, n = M.shape[-2:]
    if min(m, n) <= _SMALL:
        return _full(M, plan.rank)
    if m < n:
        V, S, Uh = _leading(scaled.mT, M.mT, plan, keys)
        return Uh.mT, S, V.mT
    r, block = min(plan.rank, n), min(plan.block, n)
    if 2 * block >= n:
        rows = falling_eigh(gram(M.mT))[1][..., :r].mT  # [..., r, n]
        S, rows, images = _triplets(rows, product(rows, M.mT), plan, keys)
        return images.mT, S, rows
    P = gaussian(plan.seed, keys, block, n, M.device, torch.float32).view(*M.shape[:-2], block, n)
    square = product(scaled.mT, scaled) if on_gram_side(m, n, block, plan.power_iters) else None
    for _ in range(plan.power_iters):
        P = product(product(P, scaled.mT), scaled) if square is None else product(P, square)
        P = orthonormalized(P)
    Q = orthonormal(product(P.double(), M.mT), plan.seed, keys)  # [..., ℓ, m]
    C = product(Q, M)  # [..., ℓ, n]
    W = _leading_eigenvectors(gram(C), r)
    S, rows, images = _triplets(product(W, Q), product(W, C), plan, keys)
    return rows.mT, S, images


def on_gram_side(m: int, n: int, block: int, power_iters: int) -> bool:
    """Whether to iterate with MᵀM [n, n], for M [m, n] and m ≥ n: where M is tall and that is cheaper.

    m n² + q n² ℓ against 2 q m n ℓ multiply-adds.  Squares in fp32 lose the directions under 3e-4 of the
    largest, which a square matrix should not risk for little.
    """
    return m >= 2 * n and n * (m + power_iters * block) < 2 * power_iters * m * block


def _leading_eigenvectors(squared: Tensor, r: int) -> Tensor:
    """The eigenvectors of the r largest eigenvalues of G [..., k, k] as rows [..., r, k]."""
    k = squared.shape[-1]
    _, vectors, _ = small.eigh(squared.view(-1, k, k))
    return vectors.view(squared.shape)[..., :r].mT


def _triplets(rows: Tensor, images: Tensor, plan: _Iteration, keys: list[str]) -> Triplets:
    """S in falling order, and in that order the rows and their images at unit length.

    From orthonormal rows [..., r, k] and their images [..., r, l] under the matrix.  The lengths are accurate
    where the eigenvalues, their squares, have drowned in rounding errors.
    """
    S, order = images.norm(dim=-1).sort(dim=-1, descending=True, stable=True)
    rows, images = (part.take_along_dim(order.unsqueeze(-1), -2) for part in (rows, images))
    units = torch.where(NULL_SPACE_TOLERANCE * S[..., :1] < S, 1 / S, 0.0).unsqueeze(-1) * images
    return S, rows, orthonormal(units, plan.seed, keys)
