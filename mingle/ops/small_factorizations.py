"""Batched factorisations of small matrices, and what surrounds them in a truncated SVD.

    cholesky_inverse   G = RᵀR → R⁻¹, so that Y R⁻¹ has orthonormal columns where G = YᵀY
    small_eigh         G = W diag(λ) Wᵀ, λ falling
    rescale            a copy whose largest magnitude lies in [0.5, 1), and what is not finite
    fix_signs_         the largest entry of every left singular vector becomes positive
    effective_rank     the exponential of the entropy of normalised singular values

Each is registered in ``torch.ops.mingle``, takes a batch on any device, runs without autograd, and returns
what went wrong as numbers on that device: no function raises for the values it meets.  On a GPU the kernels
of ``mingle._C`` compute, without waiting for the device; where they are missing, for Gram matrices wider than
128 or than the card has room for, and on a CPU, plain torch does, with equal meaning.  Eager calls go past
the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mingle.ops import small_kernels as kernels

#: How often a failed Cholesky factorisation is repeated, with a shift ten times the last one's.
RETRIES = 6
# Columns whose squared length is at most this count as zero.  In float32 the reciprocal of a length has to be
# representable, with room for an R⁻¹ whose entries exceed it by the square root of the smallest accepted
# pivot.
_NEGLIGIBLE = {torch.float64: 0.0, torch.float32: 2.0**-200}
# exp(H) of k equal values is the integer k but for roundings; this keeps them from costing a rank.
_ROUNDING = 1 + 2.0**-40


@torch.no_grad()
def cholesky_inverse(gram: Tensor, shift: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """R⁻¹ of the Cholesky factor of Gram matrices, G = RᵀR.

    It is robust to columns of very different length, and to missing rank:

        S = D^-½ G D^-½ with D = diag(G);   S + τ I = LLᵀ;   R⁻¹ = D^-½ L^-ᵀ

    τ = 0 at first.  A pivot of n + 16 ulp or less has lost all its digits: then τ = shift · tr S = shift · n,
    and ten times as much at every further attempt.  A zero column of Y, that is a zero on the diagonal, gives
    a zero row and column of R⁻¹ and so a zero column of Y R⁻¹.

    Args:
        gram: G [b, n, n] in float64, positive semidefinite; only the lower triangle is read.
        shift: relative to the trace; 11 (mn + n(n+1)) u for Y [m, n] and unit roundoff u.
        dtype: float64 or float32, of the result.  In float32, columns of Y shorter than 2⁻¹⁰⁰ count as zero.

    Returns:
        R⁻¹ [b, n, n], upper triangular, in `dtype`, and int32 flags [b]: the number of shifts, or −1 where no
        shift helped, an entry is not finite or the diagonal is negative; R⁻¹ is zero there.
    """
    return _apply(_cholesky_inverse, _registered_cholesky_inverse, gram, shift, dtype)


@torch.no_grad()
def eigh(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G = W diag(λ) Wᵀ for positive semidefinite G [b, n, n] in float64; only the lower triangle is read.

    Returns:
        λ [b, n] ≥ 0 in falling order, W [b, n, n] with the eigenvectors as columns, orthonormal whatever the
        rank, and int32 flags [b]: the number of sweeps (0 from a library's solver), or −1 where they did not
        converge or an entry is not finite.  In the latter case λ is NaN and W the identity.
    """
    return _apply(_small_eigh, _registered_small_eigh, gram)


@torch.no_grad()
def rescale(M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2^-e M in contiguous float32 with the largest finite magnitude in [0.5, 1).

    So squares and sums stay in range.

    Args:
        M: [b, m, n] in float32 or float64, any strides.

    Returns:
        2^-e M [b, m, n]; e int32 [b], 0 where all entries are zero; the number of non-finite entries, int64
        [b]; and the linear index i·n + j of the first of them, int64 [b], −1 where there is none.  Non-finite
        entries stay what they are.
    """
    return _apply(_rescale, _registered_rescale, M)


@torch.no_grad()
def fix_signs_(U: Tensor, Vh: Tensor) -> None:
    """Flip columns of U [b, m, r] and the same rows of Vh [b, r, n], in place, by one rule.

    The entry of largest magnitude in a column becomes positive; the first one where several are equal.  Both
    in float32 or both in float64, any strides, finite.
    """
    _apply(_fix_signs_, _registered_fix_signs_, U, Vh)


@torch.no_grad()
def effective_rank(sigma: Tensor) -> Tensor:
    """⌊exp(−Σ p ln p)⌋ with p = σ / Σσ and 0 · ln 0 = 0, for σ [b, k] ≥ 0 in float64 → int32 [b].

    0 where all values are zero.
    The exponential is raised by a relative 2⁻⁴⁰ first, so that k equal values have rank k whatever the
    roundings.
    """
    return _apply(_effective_rank, _registered_effective_rank, sigma)


def _apply(plain: Callable[..., Any], registered: Callable[..., Any], *arguments: Any) -> Any:
    # For one small matrix the dispatcher takes as long as the factorisation; only tracers and tensor
    # subclasses need it.
    if (
        torch.compiler.is_compiling()
        or type(arguments[0]) is not Tensor
        or torch._C._len_torch_dispatch_stack()
    ):
        return registered(*arguments)
    return plain(*arguments)


def _cholesky_inverse(gram: Tensor, shift: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _expect_gram("cholesky_inverse", gram)
    if dtype not in _NEGLIGIBLE:
        raise TypeError(f"cholesky_inverse: expected float64 or float32 as the dtype of R⁻¹, got {dtype}")
    if kernels.serve(gram, gram.shape[-1]):
        return kernels.cholesky_inverse(gram, shift, dtype)
    n = gram.shape[-1]
    lengths = gram.diagonal(0, 1, 2)  # squared, of the columns of Y
    alive = lengths > _NEGLIGIBLE[dtype]
    scale = torch.where(alive, lengths, torch.inf).rsqrt_()  # D^-½, 0 for zero columns
    S = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
    S.diagonal(0, 1, 2).fill_(1.0)
    L, failed = _factor(S)
    failed |= ~lengths.isfinite().all(1)
    flags = torch.zeros(len(gram), dtype=torch.int32, device=gram.device)
    any_failed = bool(failed.any())
    if any_failed:
        hopeless = ~gram.tril().isfinite().all(2).all(1) | (lengths < 0).any(1)
        _shift(S, L, failed & ~hopeless, shift * n, flags)
        flags[hopeless] = -1
    L_inverse = torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False)
    inverse = torch.mul(L_inverse.mT, scale.unsqueeze(2), out=gram.new_empty(gram.shape, dtype=dtype))
    if any_failed:
        inverse[flags < 0] = 0
    return inverse, flags


def _factor(S: Tensor) -> tuple[Tensor, Tensor]:
    """L of S = LLᵀ, and bool [b]: some pivot is of the size of the rounding errors in it."""
    L, info = torch.linalg.cholesky_ex(S)
    exact = L.diagonal(0, 1, 2) > ((S.shape[-1] + 16) * torch.finfo(S.dtype).eps) ** 0.5
    return L, ~exact.all(1) | (info != 0)


def _shift(S: Tensor, L: Tensor, failed: Tensor, tau: float, flags: Tensor) -> None:
    """Replace L where `failed` by the factor of S + τ I with the first of τ, 10 τ, … that succeeds.

    `flags` counts the attempts, or is −1 where none succeeded.
    """
    left = failed.nonzero().squeeze(1)
    for attempt in range(1, RETRIES + 1):
        shifted = S[left]
        shifted.diagonal(0, 1, 2).add_(tau * 10.0 ** (attempt - 1))
        L[left], again = _factor(shifted)
        flags[left] = attempt
        left = left[again]
        if not len(left):
            return
    flags[left] = -1


def _small_eigh(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _expect_gram("eigh", gram)
    if kernels.serve_eigh(gram):
        return kernels.small_eigh(gram)
    flags = torch.zeros(len(gram), dtype=torch.int32, device=gram.device)
    if gram.numel() == 0:
        return gram.new_empty(gram.shape[:2]), gram.new_empty(gram.shape), flags
    negative = -gram  # whose rising order is the falling one
    wrong = ~negative.sum((1, 2)).isfinite()
    any_wrong = bool(wrong.any())
    if any_wrong:
        wrong = ~gram.tril().isfinite().all(2).all(1)
        negative[wrong] = -torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    values, vectors = torch.linalg.eigh(negative)
    values = values.neg_().clamp_min_(0)
    if any_wrong:
        values[wrong], flags[wrong] = torch.nan, -1
    return values, vectors.contiguous(), flags


def _rescale(M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if M.ndim != 3 or M.dtype not in _NEGLIGIBLE:
        raise TypeError(
            f"rescale: expected M [b, m, n] in float32 or float64, got {list(M.shape)} in {M.dtype}"
        )
    if kernels.serve(M):
        return kernels.rescale(M)
    scaled = M.new_empty(M.shape, dtype=torch.float32)
    count = torch.zeros(len(M), dtype=torch.int64, device=M.device)
    first = torch.full_like(count, -1)
    if M.numel() == 0:
        return scaled, torch.zeros_like(count, dtype=torch.int32), count, first
    largest = torch.maximum(M.amax((1, 2)), -M.amin((1, 2)))
    if not largest.isfinite().all():
        wrong = ~M.isfinite()
        count = wrong.sum((1, 2))
        first = torch.where(count > 0, wrong.flatten(1).to(torch.uint8).argmax(1), -1)
        largest = M.abs().masked_fill_(wrong, 0).amax((1, 2))
    exponent = torch.frexp(largest).exponent
    # One factor can be too large for its format where the entries are subnormal; then there are two, both
    # exact.
    smallest, greatest = (-128, 126) if M.dtype == torch.float32 else (-1022, 1022)
    factor = (-exponent).clamp(smallest, greatest)
    torch.mul(M, _power_of_two(factor, M.dtype), out=scaled)
    rest = -exponent - factor
    if rest.any():
        torch.mul(M * _power_of_two(factor, M.dtype), _power_of_two(rest, M.dtype), out=scaled)
    return scaled, exponent, count, first


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent exactly, [b, 1, 1], for −1022 ≤ exponent ≤ 1023.

    Put together from its bits, as no power function promises exactness.
    """
    return ((exponent.long() + 1023) << 52).view(torch.float64).to(dtype)[:, None, None]


def _fix_signs_(U: Tensor, Vh: Tensor) -> None:
    if U.ndim != 3 or Vh.ndim != 3 or (len(U), U.shape[2]) != Vh.shape[:2]:
        raise ValueError(
            f"fix_signs_: expected U [b, m, r] and Vh [b, r, n], got {list(U.shape)} and {list(Vh.shape)}"
        )
    if U.dtype not in _NEGLIGIBLE or Vh.dtype != U.dtype:
        raise TypeError(
            f"fix_signs_: expected two tensors of float32 or two of float64, got {U.dtype} and {Vh.dtype}"
        )
    if U.device != Vh.device:
        raise ValueError(f"fix_signs_: U is on {U.device}, Vh on {Vh.device}")
    if kernels.serve(U):
        kernels.fix_signs_(U, Vh)
        return
    if U.numel() == 0:
        return
    peak = U.gather(1, U.abs().argmax(1, keepdim=True))  # [b, 1, r]
    sign = torch.where(peak < 0, -1.0, 1.0).to(U.dtype)
    U.mul_(sign)
    Vh.mul_(sign.mT)


def _effective_rank(sigma: Tensor) -> Tensor:
    if sigma.ndim != 2 or sigma.dtype != torch.float64:
        raise TypeError(
            f"effective_rank: expected σ [b, k] in float64, got {list(sigma.shape)} in {sigma.dtype}"
        )
    if kernels.serve(sigma):
        return kernels.effective_rank(sigma)
    total = sigma.sum(1, keepdim=True)
    p = sigma / torch.where(total > 0, total, 1.0)
    return torch.where(total[:, 0] > 0, torch.exp(-torch.xlogy(p, p).sum(1)) * _ROUNDING, 0.0).to(torch.int32)


def _expect_gram(name: str, gram: Tensor) -> None:
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or gram.dtype != torch.float64:
        raise TypeError(
            f"{name}: expected Gram matrices [b, n, n] in float64, got {list(gram.shape)} in {gram.dtype}"
        )


_registered_cholesky_inverse = torch.library.custom_op(
    "mingle::cholesky_inverse", _cholesky_inverse, mutates_args=()
)
_registered_small_eigh = torch.library.custom_op("mingle::small_eigh", _small_eigh, mutates_args=())
_registered_rescale = torch.library.custom_op("mingle::rescale", _rescale, mutates_args=())
_registered_fix_signs_ = torch.library.custom_op("mingle::fix_signs_", _fix_signs_, mutates_args=("U", "Vh"))
_registered_effective_rank = torch.library.custom_op(
    "mingle::effective_rank", _effective_rank, mutates_args=()
)


@_registered_cholesky_inverse.register_fake
def _(gram: Tensor, shift: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return gram.new_empty(gram.shape, dtype=dtype), gram.new_empty(gram.shape[0], dtype=torch.int32)


@_registered_small_eigh.register_fake
def _(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        gram.new_empty(gram.shape[:2]),
        gram.new_empty(gram.shape),
        gram.new_empty(gram.shape[0], dtype=torch.int32),
    )


@_registered_rescale.register_fake
def _(M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = M.new_empty(M.shape[0], dtype=torch.int64)
    return (
        M.new_empty(M.shape, dtype=torch.float32),
        count.new_empty(count.shape, dtype=torch.int32),
        count,
        torch.empty_like(count),
    )


@_registered_fix_signs_.register_fake
def _(U: Tensor, Vh: Tensor) -> None:
    pass


@_registered_effective_rank.register_fake
def _(sigma: Tensor) -> Tensor:
    return sigma.new_empty(sigma.shape[0], dtype=torch.int32)
