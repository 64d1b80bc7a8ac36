"""Whole decompositions against dense float64 LAPACK: of factors, from Gram matrices, and effective ranks."""

from __future__ import annotations

import math

import pytest
import torch

from mingle import linalg


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(
        torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ).Q


def with_spectrum(m, n, sigma):
    k = len(sigma)
    return (
        orthonormal(m, k, 1)
        @ torch.diag(torch.as_tensor(sigma, dtype=torch.float64))
        @ orthonormal(n, k, 2).T
    )


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (2, 3, 6, 4)])
def test_svd_lowrank_is_the_best_approximation(shape):
    M = torch.randn(*shape, dtype=torch.float64)
    U, S, Vh = linalg.svd_lowrank(M, 3)
    full = torch.linalg.svdvals(M)
    torch.testing.assert_close(S, full[..., :3])
    residual = torch.linalg.matrix_norm(M - U * S.unsqueeze(-2) @ Vh)
    torch.testing.assert_close(residual, full[..., 3:].square().sum(-1).sqrt(), atol=1e-12, rtol=1e-10)


def test_svd_lowrank_signs_zeros_and_caps():
    M = with_spectrum(9, 7, [3.0, 1.0, 1e-9])
    U, S, Vh = linalg.svd_lowrank(M, 100)
    assert U.shape == (9, 7)
    assert Vh.shape == (7, 7)
    assert (S[2:] == 0).all()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    flipped = linalg.svd_lowrank(-M, 2)
    torch.testing.assert_close(flipped[0], U[:, :2])
    torch.testing.assert_close(flipped[2], -Vh[:2])
    assert linalg.svd_lowrank(M.float(), 2)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="rank=0"):
        linalg.svd_lowrank(M, 0)
    with pytest.raises(ValueError, match="non-finite"):
        linalg.svd_lowrank(M / 0, 2)


@pytest.mark.parametrize(("m", "n", "R"), [(20, 30, 6), (8, 9, 12), (7, 7, 7)])
def test_factored_svd(m, n, R):
    B, A = torch.randn(m, R, dtype=torch.float64), torch.randn(R, n, dtype=torch.float64)
    U, S, Vh = linalg.factored_svd(B, A)
    torch.testing.assert_close(U * S @ Vh, B @ A)
    torch.testing.assert_close(S, torch.linalg.svdvals(B @ A)[: len(S)], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("sigma", "rank"),
    [([1.0], 1), ([1.0, 0.0, 0.0], 1), ([2.0, 2.0, 1e-30], 2), ([0.0, 0.0], 0), ([4.0, 2.0, 1.0], 2)],
)
def test_effective_rank(sigma, rank):
    assert linalg.effective_rank(torch.tensor(sigma)) == rank


def test_effective_rank_is_the_exponential_of_the_entropy():
    sigma = torch.linspace(0.01, 5, 200, dtype=torch.float64)
    p = (sigma / sigma.sum()).tolist()
    assert linalg.effective_rank(sigma) == int(math.exp(-sum(x * math.log(x) for x in p)))


@pytest.mark.parametrize(("m", "n"), [(30, 12), (12, 30), (17, 17)])
def test_gram_svd(m, n):
    M = torch.randn(2, m, n, dtype=torch.float64)
    U, S, Vh = linalg.gram_svd(M)
    torch.testing.assert_close(U * S.unsqueeze(-2) @ Vh, M)
    torch.testing.assert_close(S, torch.linalg.svdvals(M), rtol=1e-10, atol=1e-10)
    eye = torch.eye(min(m, n), dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(U.mT @ U, eye)
    torch.testing.assert_close(Vh @ Vh.mT, eye)


def test_gram_svd_sets_what_it_cannot_see_to_zero():
    U, S, Vh = linalg.gram_svd(with_spectrum(9, 7, [3.0, 1.0, 1e-12]))
    assert (S[2:] == 0).all()
    assert torch.isfinite(U).all() and torch.isfinite(Vh).all()
    assert linalg.gram_svd(torch.zeros(3, 4))[1].tolist() == [0, 0, 0]


def test_factored_svd_of_dependent_factors_and_of_batches():
    B, A = torch.randn(3, 40, 8, dtype=torch.float64), torch.randn(3, 8, 50, dtype=torch.float64)
    B[1, :, 4:] = B[1, :, :4]  # the same directions twice: no Cholesky factor
    A[2] = 0
    U, S, Vh = linalg.factored_svd(B, A)
    torch.testing.assert_close(U * S.unsqueeze(-2) @ Vh, B @ A)
    for i in range(3):
        torch.testing.assert_close(S[i], torch.linalg.svdvals(B[i] @ A[i])[:8], rtol=1e-9, atol=1e-6)
        torch.testing.assert_close(linalg.factored_svd(B[i], A[i])[1], S[i], rtol=1e-9, atol=1e-6)
