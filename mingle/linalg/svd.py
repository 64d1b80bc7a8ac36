"""Truncated singular value decompositions of many matrices, by block subspace iteration.

It runs in the matrices' own precision and is finished in float64.  Every result carries a certificate: the
residual norms of its triplets, and what they say of the distance to the optimum.  Where that is too large,
more rounds follow, or an exact decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mingle.kernels.dtypes import wide
from mingle.linalg.arithmetic import buckets, ieee
from mingle.linalg.certificate import Certificate, Tolerance, mend, shares_of
from mingle.linalg.subspace_iteration import (
    NULL_SPACE_TOLERANCE,
    Found,
    Iteration,
    Triplets,
    full,
    leading,
)
from mingle.ops import extension, small_kernels
from mingle.ops import small_factorizations as small

BACKENDS = ("auto", "lapack", "library", "extension")


#: mode → (oversample, power_iters, tolerance).  Of eight rounds an error of 1e-4 in B A is left where the
#: singular values around r are close together; ten, at 4 to 14 % more time, leave 2e-5.
MODES = {"accurate": (64, 10, Tolerance(1e-6, 1e-5)), "fast": (32, 7, Tolerance(1e-4, 1e-4))}


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
    plan = Iteration(rank, rank + oversample, power_iters, seed)
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
    plan = Iteration(rank, block, power_iters, seed)
    if M.numel() == 0:
        r = min(rank, m, n)
        triplets = M.new_empty(b, m, r), M.new_empty(b, r), M.new_empty(b, r, n)
        return *triplets, M.new_zeros(b, r), M.new_zeros(b), M.new_zeros(b)
    scaled, exponent, *nonfinite = small.rescale(M.to(wide(M)))
    _refuse_nonfinite(M, keys, *nonfinite)
    exact = torch.ldexp(M, -exponent[:, None, None]) if M.dtype == torch.float64 else scaled.double()
    if backend == "lapack":
        found = full(exact, plan.rank)
    elif M.device.type == "cpu":
        singles = [leading(scaled[i], exact[i], plan, keys[i : i + 1]) for i in range(b)]
        found = Found(*map(torch.stack, zip(*singles, strict=True)))
    else:
        with small_kernels.set_aside() if backend == "library" else nullcontext():
            found = leading(scaled, exact, plan, keys)
    shares = shares_of(found, exact)
    if backend != "lapack":
        mend(found, shares, scaled, exact, plan, Tolerance(deficit, excess), keys)
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
    M: Tensor, keys: list[str], plan: Iteration, wanted: Tolerance, backend: str
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
