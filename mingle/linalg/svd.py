"""Truncated singular value decompositions of many matrices, by block subspace iteration.

It runs in the matrices' own precision and is finished in float64.  Every result carries a certificate: the
residual norms of its triplets, and what they say of the distance to the optimum.  Where that is too large,
more rounds follow, or an exact decomposition.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

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


class Tolerance(NamedTuple):
    """What a result may be short of the optimal one: see `Certificate`."""

    deficit: float
    excess: float


#: mode → (oversample, power_iters, tolerance).  Of eight rounds an error of 1e-4 in B A is left where the
#: singular values around r are close together; ten, at 4 to 14 % more time, leave 2e-5.
MODES = {"accurate": (64, 10, Tolerance(1e-6, 1e-5)), "fast": (32, 7, Tolerance(1e-4, 1e-4))}

#: Of ‖M‖²: what is left of it below this is a rounding error.
_ROUNDING = 1e-12
#: An exact decomposition costs as much as one round for so many columns.
_ROUNDS_PER_COLUMN = 24
#: Up to this width a library decomposes whole batches at once, and nothing else is faster.
_SMALL = 32


@dataclass(frozen=True)
class _Iteration:
    """What one decomposition is asked for; `block` is the number ℓ of vectors that iterate."""

    rank: int
    block: int
    power_iters: int
    seed: int


class Certificate(NamedTuple):
    """How far a decomposition is from the optimal one of its rank, as its own residuals tell.

    With the distance to the ℓ-th singular value, the last one that iterates along, a residual says how much a
    σ_i² may still grow: by 2 ρ_i σ_i, and by no more than 2 ρ_i² σ_i² / (σ_i² − σ_ℓ²) to second order.

    Attributes:
        residuals: ρ_i = ‖M v_i − σ_i u_i‖ [..., r], or ‖Mᵀ u_i − σ_i v_i‖ where M is wide, in M's units; the
            other side vanishes.  0 where the decomposition is exact.
        deficit: [...], by which share Σ σ_i² may be short of the optimum.
        excess: [...], by which share ‖M − U S Vh‖ may exceed the optimum; 0 where it is a rounding error.
    """

    residuals: Tensor
    deficit: Tensor
    excess: Tensor


class _Found(NamedTuple):
    """Triplets in float64, their residual norms [..., r], and σ_ℓ [...]; both 0 where they are exact."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    beyond: Tensor

    @staticmethod
    def exactly(U: Tensor, S: Tensor, Vh: Tensor) -> _Found:
        return _Found(U, S, Vh, torch.zeros_like(S), S.new_zeros(S.shape[:-1]))

    @property
    def transposed(self) -> _Found:
        return self._replace(U=self.Vh.mT, Vh=self.U.mT)


@overload
def svd_lowrank(
    M: Tensor, rank: int, *, mode: str = ..., oversample: int | None = ..., power_iters: int | None = ...,
    seed: int = ..., keys: Sequence[str | int] | None = ..., backend: str = ..., info: Literal[False] = ...,
) -> Triplets: ...  # fmt: skip
@overload
def svd_lowrank(
    M: Sequence[Tensor], rank: int, *, mode: str = ..., oversample: int | None = ...,
    power_iters: int | None = ..., seed: int = ..., keys: Sequence[str | int] | None = ...,
    backend: str = ..., info: Literal[False] = ...,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]: ...  # fmt: skip
@overload
def svd_lowrank(
    M: Tensor, rank: int, *, mode: str = ..., oversample: int | None = ..., power_iters: int | None = ...,
    seed: int = ..., keys: Sequence[str | int] | None = ..., backend: str = ..., info: Literal[True],
) -> tuple[Tensor, Tensor, Tensor, Certificate]: ...  # fmt: skip
@overload
def svd_lowrank(
    M: Sequence[Tensor], rank: int, *, mode: str = ..., oversample: int | None = ...,
    power_iters: int | None = ..., seed: int = ..., keys: Sequence[str | int] | None = ...,
    backend: str = ..., info: Literal[True],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Certificate]]: ...  # fmt: skip
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
    info: bool = False,
) -> Any:
    """The leading singular triplets M ≈ U diag(S) Vh of one matrix, a batch, or a list of any shapes.

    Block subspace iteration (Halko, Martinsson and Tropp, SIAM Review 53, 2011) with ℓ = rank + oversample
    vectors, orthonormalised by Cholesky QR with Gram matrices in float64.  fp32 matrices iterate in fp32 and
    finish with one round in float64; where one side is much longer than the other, the iteration runs on the
    Gram matrix of the shorter one.  Where ℓ reaches half the shorter side the Gram matrix is decomposed
    exactly, and so it is where the `Certificate` of a result asks for more rounds than that would cost; a
    debug message says so.

    Args:
        M: [..., m, n], or a sequence of [m, n], in a floating dtype.
        rank: r; at most min(m, n) triplets are returned.
        mode: ``"accurate"``, whose residual exceeds the optimal one by less than a factor 1 + 1e-5, or
            ``"fast"`` with 1 + 1e-4.  Of a task vector the leading part B A itself was within 1e-4 wherever
            tried, singular values a thousandth apart around r included.
        oversample, power_iters: vectors beyond the rank, and applications of MᵀM in the iteration; they
            overrule `mode`, and no more rounds follow.
        seed: of the random start.
        keys: one name per matrix, which its random start depends on and errors mention.  Without keys all
            start alike.  The result for a matrix depends on neither the batch it is in nor its place there,
            beyond a GPU library's own choice of kernels.
        backend: ``"lapack"`` decomposes fully in float64; ``"library"`` iterates with PyTorch's own small
            factorisations, ``"extension"`` with the CUDA kernels of ``mingle._C``; ``"auto"`` iterates with
            what there is.
        info: also return a `Certificate`, for a sequence a list of them.

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
    vectors, rounds, tolerance = MODES.get(mode, MODES["accurate"])
    wanted = tolerance if oversample is power_iters is None else Tolerance(math.inf, math.inf)
    oversample = vectors if oversample is None else oversample
    power_iters = rounds if power_iters is None else power_iters
    _check(M, rank, mode, oversample, power_iters, backend)
    count = M.shape[:-2].numel() if isinstance(M, Tensor) else len(matrices)
    names = _names(keys, count)
    plan = _Iteration(rank, rank + oversample, power_iters, seed)
    if isinstance(M, Tensor):
        flat = _apply(M.reshape(count, *M.shape[-2:]), names, plan, wanted, backend)
        U, S, Vh, *certificate = (part.reshape(M.shape[:-2] + part.shape[1:]) for part in flat)
        return (U, S, Vh, Certificate(*certificate)) if info else (U, S, Vh)
    results: list[tuple[Tensor, ...]] = [()] * len(matrices)
    for places in buckets(matrices):
        together = torch.stack([matrices[i] for i in places])
        parts = _apply(together, [names[i] for i in places], plan, wanted, backend)
        for i, *own in zip(places, *parts, strict=True):
            results[i] = tuple(own)
    Us, Ss, Vhs = ([own[part] for own in results] for part in range(3))
    return (Us, Ss, Vhs, [Certificate(*own[3:]) for own in results]) if info else (Us, Ss, Vhs)


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
    M: Tensor,
    rank: int,
    block: int,
    power_iters: int,
    seed: int,
    deficit: float,
    excess: float,
    backend: str,
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`svd_lowrank` of M [b, m, n] with `block` = ℓ vectors; `names` has one key per matrix, a line each.

    The triplets and the three tensors of their certificate.
    """
    keys = names.split("\n")
    b, m, n = M.shape
    plan = _Iteration(rank, block, power_iters, seed)
    if M.numel() == 0:
        r = min(rank, m, n)
        triplets = M.new_empty(b, m, r), M.new_empty(b, r), M.new_empty(b, r, n)
        return *triplets, M.new_zeros(b, r), M.new_zeros(b), M.new_zeros(b)
    scaled, exponent, *nonfinite = small.rescale(M.to(wide(M)))
    _refuse_nonfinite(M, keys, *nonfinite)
    exact = torch.ldexp(M, -exponent[:, None, None]) if M.dtype == torch.float64 else scaled.double()
    if backend == "lapack":
        found = _full(exact, plan.rank)
    elif M.device.type == "cpu":
        singles = [_leading(scaled[i], exact[i], plan, keys[i : i + 1]) for i in range(b)]
        found = _Found(*map(torch.stack, zip(*singles, strict=True)))
    else:
        with small_kernels.set_aside() if backend == "library" else nullcontext():
            found = _leading(scaled, exact, plan, keys)
    shares = _shares(found, exact)
    if backend != "lapack":
        _mend(found, shares, scaled, exact, plan, Tolerance(deficit, excess), keys)
    U, S, Vh = found[:3]
    S = torch.ldexp(torch.where(NULL_SPACE_TOLERANCE * S[:, :1] < S, S, 0.0), exponent[:, None])
    residuals = torch.ldexp(found.residuals, exponent[:, None])
    U, Vh = U.to(wide(M)), Vh.to(wide(M))
    small.fix_signs_(U, Vh)
    return tuple(part.to(M.dtype) for part in (U, S, Vh, residuals, *shares))  # type: ignore[return-value]


_registered = torch.library.custom_op("mingle::svd_lowrank", _svd_lowrank, mutates_args=())


@_registered.register_fake
def _(
    M: Tensor, rank: int, block: int, power_iters: int, seed: int, deficit: float, excess: float,
    backend: str, names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    b, m, n = M.shape
    r = min(rank, m, n)
    triplets = M.new_empty(b, m, r), M.new_empty(b, r), M.new_empty(b, r, n)
    return *triplets, M.new_empty(b, r), M.new_empty(b), M.new_empty(b)


def _apply(
    M: Tensor, keys: list[str], plan: _Iteration, wanted: Tolerance, backend: str
) -> tuple[Tensor, ...]:
    operator = _registered if torch.compiler.is_compiling() else _svd_lowrank
    return operator(M, plan.rank, plan.block, plan.power_iters, plan.seed, *wanted, backend, "\n".join(keys))


def _refuse_nonfinite(M: Tensor, keys: list[str], count: Tensor, first: Tensor) -> None:
    for i, (wrong, place) in enumerate(zip(count.tolist(), first.tolist(), strict=True)):
        if wrong:
            name = repr(keys[i]) if keys[i] != "" else f"{i} of {len(M)}"
            entry = list(divmod(place, M.shape[2]))
            raise ValueError(
                f"matrix {name} {list(M.shape[1:])} has non-finite entries: {wrong}, the first at {entry}"
            )


def _full(M: Tensor, rank: int) -> _Found:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return _Found.exactly(U[..., :rank], S[..., :rank], Vh[..., :rank, :])


def _shares(found: _Found, M: Tensor) -> tuple[Tensor, Tensor]:
    """The deficit and the excess of a `Certificate`, of one matrix or of each in a batch."""
    S, residuals, beyond = found.S, found.residuals, found.beyond.unsqueeze(-1)
    # below this a residual is the rounding of an iteration in fp32
    residuals = torch.where(residuals > 4 * torch.finfo(torch.float32).eps * S[..., :1], residuals, 0.0)
    growth = residuals * S
    gap = (S**2 - beyond**2).clamp_min(torch.finfo(S.dtype).tiny)
    lost = torch.minimum(2 * growth, 2 * growth * (growth / gap)).sum(-1)
    captured, whole = (S**2).sum(-1), torch.linalg.matrix_norm(M) ** 2
    left = whole - captured
    return lost / captured.clamp_min(torch.finfo(S.dtype).tiny), torch.where(
        left > _ROUNDING * whole, lost / (2 * left), 0.0
    )


def _mend(
    found: _Found,
    shares: tuple[Tensor, Tensor],
    scaled: Tensor,
    M: Tensor,
    plan: _Iteration,
    wanted: Tolerance,
    keys: list[str],
) -> None:
    """Improve `found` and its `shares` in place for the matrices whose shares are larger than is wanted.

    Where the iteration did not end in orthonormal vectors at all, LAPACK's result takes its place.
    """
    orthonormal = (defect(found.U.mT) <= ORTHONORMAL) & (defect(found.Vh) <= ORTHONORMAL)
    trust = orthonormal & found.S.isfinite().all(-1)
    short = torch.stack([share / most for share, most in zip(shares, wanted, strict=True)]).amax(0)
    for i in (~(trust & (short <= 1))).nonzero().flatten().tolist():
        name, shape = keys[i] or i, list(M.shape[1:])
        if trust[i]:
            better = _better(
                scaled[i], M[i], plan, wanted, keys[i : i + 1], _needed(found, i, float(short[i]))
            )
        else:
            logger.warning(
                "the subspace iteration failed for matrix %r %s; decomposed fully instead", name, shape
            )
            better = _full(M[i], plan.rank)
        for part, own in zip((*found, *shares), (*better, *_shares(better, M[i])), strict=True):
            part[i] = own


def _needed(found: _Found, i: int, short: float) -> float:
    """The rounds that bring what matrix i lacks, `short` times what it may, to half of that."""
    closeness = float(found.beyond[i] / found.S[i, -1].clamp_min(torch.finfo(found.S.dtype).tiny))
    return math.log(2 * short) / (-4 * math.log(closeness)) if 0 < closeness < 1 else math.inf


def _better(
    scaled: Tensor, M: Tensor, plan: _Iteration, wanted: Tolerance, keys: list[str], needed: float
) -> _Found:
    """One matrix again: with as many more rounds as are `needed`, or exactly where that costs less."""
    name, shape = keys[0] or "without a key", list(M.shape)
    if needed <= min(shape) / _ROUNDS_PER_COLUMN:
        longer = replace(plan, power_iters=plan.power_iters + math.ceil(needed))
        logger.debug(
            "matrix %s %s: %d rounds instead of %d", name, shape, longer.power_iters, plan.power_iters
        )
        found = _leading(scaled, M, longer, keys)
        if all(float(share) <= most for share, most in zip(_shares(found, M), wanted, strict=True)):
            return found
    logger.debug("matrix %s %s: singular values too close for rounds; decomposed exactly", name, shape)
    return _leading(scaled, M, replace(plan, block=min(shape)), keys)


def _leading(scaled: Tensor, M: Tensor, plan: _Iteration, keys: list[str]) -> _Found:
    """The triplets, in float64, of a matrix or a batch M [..., m, n] in float64; `scaled` is M in fp32."""
    m, n = M.shape[-2:]
    if min(m, n) <= _SMALL:
        return _full(M, plan.rank)
    if m < n:
        return _leading(scaled.mT, M.mT, plan, keys).transposed
    r, block = min(plan.rank, n), min(plan.block, n)
    if 2 * block >= n:
        rows = falling_eigh(gram(M.mT))[1][..., :r].mT  # [..., r, n]
        S, rows, images = _triplets(rows, product(rows, M.mT), plan, keys)
        return _Found.exactly(images.mT, S, rows)
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
    return _Found(rows.mT, S, images, residuals.norm(dim=-1), beyond)


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


def _triplets(rows: Tensor, images: Tensor, plan: _Iteration, keys: list[str]) -> Triplets:
    """S in falling order, and in that order the rows and their images at unit length.

    From orthonormal rows [..., r, k] and their images [..., r, l] under the matrix.  The lengths are accurate
    where the eigenvalues, their squares, have drowned in rounding errors.
    """
    S, order = images.norm(dim=-1).sort(dim=-1, descending=True, stable=True)
    rows, images = (part.take_along_dim(order.unsqueeze(-1), -2) for part in (rows, images))
    units = torch.where(NULL_SPACE_TOLERANCE * S[..., :1] < S, 1 / S, 0.0).unsqueeze(-1) * images
    return S, rows, orthonormal(units, plan.seed, keys)
