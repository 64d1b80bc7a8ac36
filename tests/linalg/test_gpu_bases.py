"""Spectra, effective ranks and bases on a GPU are those of the CPU."""

from __future__ import annotations

import pytest
import torch

from mingle import linalg

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def product(U, S, Vh):
    return U * S.unsqueeze(-2) @ Vh


def test_spectra_and_effective_ranks_are_those_of_the_cpu():
    B, A = torch.randn(5, 120, 24), torch.randn(5, 24, 90)
    for found, expected in (
        (linalg.factored_svd(B.to(DEVICE), A.to(DEVICE)), linalg.factored_svd(B, A)),
        (linalg.gram_svd((B @ A).to(DEVICE)), linalg.gram_svd(B @ A)),
    ):
        torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-9, atol=1e-5)
        torch.testing.assert_close(product(*found).cpu(), product(*expected), rtol=0, atol=1e-5)
        assert torch.equal(linalg.effective_ranks(found[1]).cpu(), linalg.effective_ranks(expected[1]))
    assert linalg.effective_rank(torch.ones(7, device=DEVICE)) == 7
    assert linalg.effective_rank(torch.zeros(7, device=DEVICE)) == 0


def test_bases_are_those_of_the_cpu():
    vectors = torch.randn(700, 500, dtype=torch.float64) * torch.arange(1, 501).pow(-1.0)
    covariance = vectors.mT @ vectors
    found, expected = linalg.top_subspace(covariance.to(DEVICE), 3), linalg.top_subspace(covariance, 3)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-7)
    grown = linalg.extend_basis(
        found, torch.cat([found[:, :1], torch.randn(500, 4, dtype=torch.float64, device=DEVICE)], 1)
    )
    assert grown.is_cuda and grown.shape == (500, 7)
    torch.testing.assert_close(
        grown.mT @ grown, torch.eye(7, dtype=torch.float64, device=DEVICE), rtol=0, atol=1e-10
    )
    directions = linalg.InputDirections(500).including(vectors.to(DEVICE)).top(3)
    torch.testing.assert_close(directions.cpu(), expected, rtol=0, atol=1e-7)
