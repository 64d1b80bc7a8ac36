"""Matrices with given singular values, and the figures by which a truncated decomposition is judged against
LAPACK in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _values(name: str, k: int, r: int) -> Tensor:
    """k singular values of the named spectrum; r is where it is cut."""
    i = torch.arange(1, k + 1, dtype=torch.float64)
    # as many e-folds up to r as these have for the usual r = 64
    stretched = i * 64 / r
    table = {
        "0.9^k": 0.9**stretched,
        "0.98^k": 0.98**stretched,
        "1/k": 1 / i,
        "1/sqrt(k)": i.rsqrt(),
        "flat": torch.ones(k, dtype=torch.float64),
        "cluster across r": torch.where(
            (i - r).abs() <= r / 4, 0.5 * (3 / 4 * r) ** -1.0, torch.where(i < r, 1 / i, 0.4 / i)
        ),
        "low rank and noise": torch.where(i <= r / 2, 1 / i, 1e-3),
        "rank below r": torch.where(i <= 5 * r / 8, 1 / i, 0.0),
        "one": torch.where(i == 1, 1.0, 0.0),
        "zero": torch.zeros(k, dtype=torch.float64),
    }
    return table[name]


SPECTRA = (
    "0.9^k",
    "0.98^k",
    "1/k",
    "1/sqrt(k)",
    "flat",
    "cluster across r",
    "low rank and noise",
    "rank below r",
    "one",
    "zero",
)


def matrix(spectrum: str, m: int, n: int, r: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random matrix [m, n] with these singular values."""
    generator, k = torch.Generator().manual_seed(seed), min(m, n)
    left, right = (
        torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q for size in (m, n)
    )
    return (left * _values(spectrum, k, r) @ right.mT).to(dtype)


class Figures(NamedTuple):
    """Errors of a truncated decomposition; `excess` and `deficit` are None where the matrix has no more than
    r singular values.
    """

    excess: float | None  # ‖M − U S Vᵀ‖ over the least possible, less 1
    deficit: float | None  # energy that the best approximation has and this one lacks, over the whole
    relative: float  # ‖M − U S Vᵀ‖ / ‖M‖
    orthogonality: float  # max |UᵀU − I|, and of V
    values: float  # largest relative error of a singular value of 1e-6 of the largest or more


def figures(M: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Figures:
    """The figures for one matrix."""
    M, U, S, Vh = (part.double() for part in (M, U, S, Vh))
    r, exact = len(S), torch.linalg.svdvals(M)
    tail, whole = exact[r:].square().sum(), exact.square().sum()
    residual = (M - U * S @ Vh).square().sum()
    full = tail > 1e-12 * whole
    identity = torch.eye(r, dtype=torch.float64)
    off = torch.maximum((U.mT @ U - identity).abs().max(), (Vh @ Vh.mT - identity).abs().max())
    seen = exact[:r] >= 1e-6 * exact[0].clamp_min(1e-300)
    return Figures(
        excess=(residual.sqrt() / tail.sqrt() - 1).item() if full else None,
        deficit=((residual - tail) / whole).item() if full else None,
        relative=(residual.sqrt() / whole.sqrt().clamp_min(1e-300)).item(),
        orthogonality=off.item(),
        values=((S - exact[:r]) / exact[:r])[seen].abs().amax().item() if seen.any() else 0.0,
    )


LIMITS = {
    "accurate": Figures(excess=1e-5, deficit=1e-6, relative=2e-6, orthogonality=2e-6, values=1e-4),
    "fast": Figures(excess=1e-4, deficit=1e-4, relative=2e-6, orthogonality=2e-6, values=1e-3),
}


def check(M: Tensor, U: Tensor, S: Tensor, Vh: Tensor, limits: Figures) -> None:
    """Hold one matrix's figures against `limits`; on any device."""
    found = figures(*(part.cpu() for part in (M, U, S, Vh)))
    assert found.orthogonality <= limits.orthogonality, found
    assert found.values <= limits.values, found
    if found.excess is None:
        assert found.relative <= limits.relative, found
    else:
        assert found.excess <= limits.excess and found.deficit <= limits.deficit, found
