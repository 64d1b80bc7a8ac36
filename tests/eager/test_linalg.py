"""Decompositions, projections and bases against dense float64 LAPACK."""

from __future__ import annotations

import math

import pytest
import torch

from mingle import linalg
from mingle.layers import LowRankExpert
from mingle.projection import make_expert, project_out_experts


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


def with_spectrum(m, n, sigma):
    k = len(sigma)
    return orthonormal(m, k, 1) @ torch.diag(torch.as_tensor(sigma, dtype=torch.float64)) @ orthonormal(n, k, 2).T


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
    ("sigma", "rank"), [([1.0], 1), ([1.0, 0.0, 0.0], 1), ([2.0, 2.0, 1e-30], 2), ([0.0, 0.0], 0), ([4.0, 2.0, 1.0], 2)]
)
def test_effective_rank(sigma, rank):
    assert linalg.effective_rank(torch.tensor(sigma)) == rank


def test_effective_rank_is_the_exponential_of_the_entropy():
    sigma = torch.linspace(0.01, 5, 200, dtype=torch.float64)
    p = (sigma / sigma.sum()).tolist()
    assert linalg.effective_rank(sigma) == int(math.exp(-sum(x * math.log(x) for x in p)))


@pytest.mark.parametrize("drop_diagonal", [False, True])
def test_projection_of_equation_3(drop_diagonal):
    experts = [LowRankExpert(torch.randn(3, 14, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)) for _ in range(2)]
    delta = torch.randn(10, 14, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(sum(e.delta() for e in experts), full_matrices=True)
    alpha = linalg.effective_rank(S)
    assert 1 <= alpha < 6
    core = U.T @ delta @ Vh.T
    core[:alpha, :alpha] = 0
    if drop_diagonal:
        for j in range(alpha, 6):  # rank(S) = 6: null directions are never touched
            core[j, j] = 0
    got = project_out_experts(delta, experts, drop_diagonal=drop_diagonal)
    torch.testing.assert_close(got, U @ core @ Vh)
    assert torch.equal(project_out_experts(delta, []), delta)


def test_projection_is_idempotent_and_annihilates_the_protected_block():
    expert = LowRankExpert(torch.randn(2, 9, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))
    once = project_out_experts(torch.randn(8, 9, dtype=torch.float64), [expert])
    torch.testing.assert_close(project_out_experts(once, [expert]), once)
    U, S, Vh = torch.linalg.svd(expert.delta())
    leading = linalg.effective_rank(S)
    assert (U[:, :leading].T @ once @ Vh[:leading].T).abs().max() < 1e-13


def test_make_expert():
    delta = torch.randn(10, 14)
    expert = make_expert(delta, [], rank=4)
    U, S, Vh = torch.linalg.svd(delta.double())
    torch.testing.assert_close(expert.delta().double(), U[:, :4] * S[:4] @ Vh[:4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expert.B.T @ expert.B, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(expert.A.norm(dim=1).double(), S[:4], rtol=1e-6, atol=0)  # float32 results
    assert expert.A.dtype == torch.float32


def test_top_subspace():
    tokens = torch.randn(500, 12, dtype=torch.float64) @ torch.diag(torch.linspace(3, 0.1, 12, dtype=torch.float64))
    basis = linalg.top_subspace(tokens.T @ tokens, 3)
    exact = torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T
    torch.testing.assert_close(basis @ basis.T, exact @ exact.T, atol=1e-9, rtol=0)
    one = torch.zeros(5, 5)
    one[2, 2] = 4.0
    assert linalg.top_subspace(one, 3).shape == (5, 1)
    assert linalg.top_subspace(torch.zeros(5, 5), 3).shape == (5, 0)


def test_extend_basis_reveals_the_rank():
    old = orthonormal(12, 4)
    inside = old @ torch.randn(4, 3, dtype=torch.float64)
    assert linalg.extend_basis(old, inside).shape == (12, 4)
    mixed = torch.cat([inside, torch.randn(12, 2, dtype=torch.float64)], 1)
    grown = linalg.extend_basis(old, mixed)
    assert grown.shape == (12, 6)
    assert torch.equal(grown[:, :4], old)
    torch.testing.assert_close(grown.T @ grown, torch.eye(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(grown @ grown.T @ mixed, mixed)


def test_extend_basis_is_a_qr_factorisation_where_nothing_is_dropped():
    old, new = orthonormal(12, 4), torch.randn(12, 3, dtype=torch.float64)
    exact = torch.linalg.qr(torch.cat([old, new], 1)).Q
    torch.testing.assert_close((linalg.extend_basis(old, new) * exact).sum(0).abs(), torch.ones(7, dtype=torch.float64))


def test_extend_basis_ignores_scale_and_stops_at_the_whole_space():
    basis = torch.empty(5, 0, dtype=torch.float64)
    for scale in (1e-12, 1.0, 1e12):
        basis = linalg.extend_basis(basis, scale * torch.randn(5, 3, dtype=torch.float64))
    assert basis.shape == (5, 5)
    assert linalg.extend_basis(basis, torch.randn(5, 2, dtype=torch.float64)).shape == (5, 5)
    assert linalg.extend_basis(basis[:, :1], torch.zeros(5, 2, dtype=torch.float64)).shape == (5, 1)
    assert linalg.extend_basis(basis[:, :1].float(), torch.randn(5, 2)).dtype == torch.float32
