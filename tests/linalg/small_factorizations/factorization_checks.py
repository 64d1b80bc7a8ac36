"""What every implementation of the small factorisations has to satisfy: plain torch, csrc on the host, csrc
on a GPU.

A check takes an implementation, an object with the functions of `mingle.ops.small_factorizations`, and
asserts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

F64, U = torch.float64, 2.0**-53
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128)
COMPACT = (1, 2, 3, 8, 9, 21, 40)


def shift(m: int, n: int) -> float:
    return 11 * (m * n + n * (n + 1)) * U


def basis(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]


def factors(n: int) -> dict[str, Tensor]:
    """Y [m, n] of every kind, by name."""
    m, fall = 2 * n + 3, torch.arange(n, dtype=F64)
    Y = torch.randn(m, n, dtype=F64)
    kinds = {
        "plain": Y,
        "graded columns": Y * 10 ** (-15 * fall / max(n - 1, 1)),
        "graded spectrum": torch.linalg.qr(Y)[0] * 10 ** (-7.5 * fall / max(n - 1, 1)) @ basis(n).mT,
        "falling": torch.linalg.qr(Y)[0] * 0.9**fall @ basis(n).mT,
        "orthonormal": torch.linalg.qr(Y)[0],
        "cluster": torch.linalg.qr(Y)[0] * torch.where(fall < n / 2, 1.0, 0.5) @ basis(n).mT,
        "tight clusters": torch.linalg.qr(Y)[0]
        * torch.where(fall < n / 3, 1.0, 0.03)
        * (1 + 1e-6 * torch.rand(n, dtype=F64))
        @ basis(n).mT,
        "rank deficient": Y[:, : (n + 1) // 2] @ torch.randn((n + 1) // 2, n, dtype=F64),
        "rank one": Y[:, :1] @ torch.ones(1, n, dtype=F64),
        "duplicates": Y[:, fall.long() // 2],
        "zero": torch.zeros_like(Y),
        "huge": Y * 2.0**500,
        "tiny": Y * 2.0**-500,
    }
    kinds["one short"] = Y - Y.mean(
        1, keepdim=True
    )  # the null vector is as far from every unit vector as it can be
    kinds["zero columns"] = Y * (fall % 3 != 1)
    return kinds


def grams(n: int) -> tuple[list[str], Tensor]:
    """Names and G = YᵀY [kinds, n, n]."""
    kinds = factors(n)
    return list(kinds), torch.stack([Y.mT @ Y for Y in kinds.values()])


WELL_CONDITIONED = (
    "plain",
    "graded columns",
    "orthonormal",
    "cluster",
    "zero",
    "huge",
    "tiny",
    "zero columns",
)


def cholesky(ops: Any, sizes: tuple[int, ...] = SIZES) -> None:
    """Q = Y R⁻¹ is orthonormal whatever the lengths of columns; zero columns stay zero; missing rank costs a
    shift and stays bounded.
    """
    for n in sizes:
        kinds = factors(n)
        G = torch.stack([Y.mT @ Y for Y in kinds.values()])
        for dtype, limit in ((F64, 1e-9), (torch.float32, 1e-5)):
            inverse, flags = ops.cholesky_inverse(G, shift(2 * n + 3, n), dtype)
            assert inverse.dtype == dtype and torch.equal(inverse, inverse.triu())
            for (name, Y), R, flag in zip(kinds.items(), inverse.double(), flags.tolist(), strict=True):
                if dtype == torch.float32 and name in (
                    "tiny",
                    "huge",
                ):  # no float32 is the reciprocal of their length
                    continue
                alive = Y.any(0)
                assert flag >= 0 and R.isfinite().all() and torch.equal(R.diagonal() != 0, alive), (name, n)
                Q = Y @ R
                if name in WELL_CONDITIONED:
                    assert flag == 0, (name, n, flag)
                    assert (Q.mT @ Q - torch.diag(alive.double())).abs().max() < limit, (name, n, dtype)
                elif name in ("rank one", "duplicates") and n > 3:
                    assert flag == 1, (name, n, flag)
                if (
                    name != "rank deficient"
                ):  # where the noise in a late pivot may be large, and the pivot small by chance
                    assert torch.linalg.matrix_norm(Q, 2) < 3, (name, n)


def growing_shift(ops: Any) -> None:
    """τ = shift · n, then ten times as much at each of six attempts, until it exceeds what is missing."""
    for n in (4, 20):
        missing = torch.tensor([-1.0, 3e-12, 3e-11, 3e-9, 3e-8, 1e-3], dtype=F64)
        G = torch.eye(n, dtype=F64) - (1 + missing[:, None, None]) / n  # the smallest eigenvalue is −missing
        inverse, flags = ops.cholesky_inverse(G, 1e-12 / n)
        assert (
            flags.tolist() == [0, 2, 3, 5, 6, -1] and inverse[:-1].isfinite().all() and not inverse[-1].any()
        )


def two_rounds(ops: Any, sizes: tuple[int, ...] = (16, 64, 128)) -> None:
    """Condition numbers up to 1e7: a round makes Y well conditioned, the next ones orthonormal."""
    for n in sizes:
        for condition in (1e1, 1e4, 1e6, 1e7):
            m, fall = 4 * n, torch.arange(n, dtype=F64) / (n - 1)
            Q = torch.linalg.qr(torch.randn(m, n, dtype=F64))[0] * condition**-fall @ basis(n).mT
            errors = []
            for _ in range(3):
                inverse, flags = ops.cholesky_inverse((Q.mT @ Q)[None], shift(m, n))
                assert flags.item() >= 0
                Q = Q @ inverse[0]
                errors.append((Q.mT @ Q - torch.eye(n)).abs().max().item())
            assert (
                errors[0] < max(1.0 if condition > 1e6 else 0.1, 1e-15)
                and errors[1] < 1e-8
                and errors[2] < 1e-14
            ), (
                n,
                condition,
                errors,
            )


def eigh(ops: Any, sizes: tuple[int, ...] = SIZES) -> None:
    """WᵀGW = diag(λ) and WᵀW = I to rounding for every kind; λ as LAPACK's."""
    for n in sizes:
        names, G = grams(n)
        values, vectors, flags = ops.eigh(G)
        for name, lam, W, g, flag in zip(names, values, vectors, G, flags.tolist(), strict=True):
            exact = torch.linalg.eigvalsh(g).flip(0).clamp_min(0)
            size = exact[0].item() or 1.0
            assert 0 <= flag <= (20 if name == "tight clusters" else 15), (name, n, flag)
            assert (lam >= 0).all() and (lam.diff() <= 0).all(), (name, n)
            assert (W.mT @ W - torch.eye(n)).abs().max() < 1e-14, (
                name,
                n,
                (W.mT @ W - torch.eye(n)).abs().max(),
            )
            assert (W.mT @ g @ W - torch.diag(lam)).abs().max() <= 1e-13 * size, (name, n)
            assert (lam - exact).abs().max() <= 1e-13 * size, (name, n)


def not_finite(ops: Any) -> None:
    """NaN and ±∞ anywhere in the lower triangle: −1, results that say so, and neighbours as if alone;
    indefinite matrices: −1.
    """
    for n in (1, 5, 40, 128):
        Y = torch.randn(3, n + 2, n, dtype=F64)
        G = Y.mT @ Y
        R, _ = ops.cholesky_inverse(G, 1e-9)
        lam, W, _ = ops.eigh(G)
        for value in (math.nan, math.inf, -math.inf):
            for place in {(0, 0), (n - 1, n - 1), (n - 1, 0), (n // 2, n // 3)}:
                wrong = G.clone()
                wrong[1][place] = value
                inverse, flags = ops.cholesky_inverse(wrong, 1e-9)
                assert (
                    flags.tolist() == [0, -1, 0]
                    and not inverse[1].any()
                    and torch.equal(inverse[::2], R[::2])
                )
                values, vectors, flags = ops.eigh(wrong)
                assert (
                    flags[1] == -1
                    and values[1].isnan().all()
                    and torch.equal(vectors[1], torch.eye(n, dtype=F64))
                )
                assert torch.equal(values[::2], lam[::2]) and torch.equal(vectors[::2], W[::2])
    indefinite = torch.stack(
        [torch.eye(3), torch.tensor([[1.0, 9, 0], [9, 1, 0], [0, 0, 1]]), -torch.eye(3)]
    ).double()
    inverse, flags = ops.cholesky_inverse(indefinite, 1e-12)
    assert flags.tolist() == [0, -1, -1] and not inverse[1:].any()


def lower_triangle(ops: Any) -> None:
    """What stands above the diagonal is not read."""
    for n in (2, 9, 33):
        G = torch.randn(1, 2 * n, n, dtype=F64)
        G = G.mT @ G
        half = G.tril() + torch.full_like(G, math.nan).triu(1)
        for a, b in zip(
            ops.cholesky_inverse(G, 1e-12) + ops.eigh(G),
            ops.cholesky_inverse(half, 1e-12) + ops.eigh(half),
            strict=True,
        ):
            assert torch.equal(a, b)


def rescaling(ops: Any) -> None:
    """2^-e M to the last bit from subnormal to huge, strided rows included; what is not finite is counted and
    kept.
    """
    for dtype in (torch.float32, F64):
        for size in (1e-45, 3e-39, 1e-20, 1.0, 3e38) + ((1e-320, 1e-200, 1e300) if dtype == F64 else ()):
            for rows in (1, 6):
                unit = torch.rand(3, 7, 11, dtype=dtype) - 0.5
                M = (unit / unit.abs().amax((1, 2), keepdim=True) * size)[:, :rows, 2:]
                scaled, e, count, first = ops.rescale(M)
                exact = torch.tensor(
                    [
                        math.ldexp(x, -k)
                        for m, k in zip(M, e.tolist(), strict=True)
                        for x in m.flatten().tolist()
                    ]
                )
                assert scaled.is_contiguous() and torch.equal(scaled.flatten(), exact.float())
                peak = M.double().abs().amax((1, 2))
                assert e.tolist() == [math.frexp(x)[1] for x in peak.tolist()]
                assert count.tolist() == [0, 0, 0] and first.tolist() == [-1, -1, -1]
        M = torch.randn(4, 9, 40, dtype=dtype)
        M[1, 2, 3], M[1, 8, 39], M[2], M[3] = math.inf, math.nan, 0, -math.inf
        scaled, e, count, first = ops.rescale(M)
        assert (
            count.tolist() == [0, 2, 0, 360]
            and first.tolist() == [-1, 83, -1, 0]
            and e[2:].tolist() == [0, 0]
        )
        assert (
            torch.equal(scaled.isfinite(), M.isfinite())
            and scaled[1, 8, 39].isnan()
            and scaled[1, 2, 3] == math.inf
        )
        assert 0.5 <= scaled[1][scaled[1].isfinite()].abs().max() <= 1


def signs(ops: Any) -> None:
    """The first of the largest magnitudes becomes positive, for any strides, and U Vh stays."""
    for dtype in (torch.float32, F64):
        for m, r, n in ((1, 1, 1), (9, 3, 5), (70, 33, 40), (30, 64, 7)):
            U, Vh = torch.randn(2, m, r, dtype=dtype), torch.randn(2, n, r, dtype=dtype).mT
            U[:, :, -1] = 0
            if m > 8:
                U[:, 2, 0], U[:, 7, 0], U[:, 4, 1], U[:, 8, 1] = -9, 9, 9, -9
            expected = torch.where(U.gather(1, U.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).to(dtype)
            for left, right in ((U.clone(), Vh.clone()), (U.mT.clone().mT, Vh.mT.clone().mT)):
                ops.fix_signs_(left, right)
                assert torch.equal(left, U * expected) and torch.equal(right, Vh * expected.mT)


def ranks(ops: Any) -> None:
    """⌊exp(entropy)⌋, exactly k for k equal values."""
    for k in (1, 2, 3, 7, 49, 100, 128, 200, 1000):
        sigma = torch.rand(4, k, dtype=F64) ** 3
        sigma[1], sigma[2], sigma[3] = 0, 0.3, 0
        sigma[3, k // 2] = 5
        p = sigma[0] / sigma[0].sum()
        plain = int(math.exp(-(p * p.log()).sum()) * (1 + 1e-12))
        assert ops.effective_rank(sigma).tolist() == [plain, 0, k, 1], k


ALL = (cholesky, growing_shift, two_rounds, eigh, not_finite, lower_triangle, rescaling, signs, ranks)
