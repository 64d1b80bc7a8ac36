"""The leading eigenvectors of a covariance."""

from __future__ import annotations

import pytest
import torch

from mingle import linalg
from mingle.linalg import subspace


def test_top_subspace():
    tokens = torch.randn(500, 12, dtype=torch.float64) @ torch.diag(
        torch.linspace(3, 0.1, 12, dtype=torch.float64)
    )
    basis = linalg.top_subspace(tokens.T @ tokens, 3)
    exact = torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T
    torch.testing.assert_close(basis @ basis.T, exact @ exact.T, atol=1e-9, rtol=0)
    one = torch.zeros(5, 5)
    one[2, 2] = 4.0
    assert linalg.top_subspace(one, 3).shape == (5, 1)
    assert linalg.top_subspace(torch.zeros(5, 5), 3).shape == (5, 0)


def stream(d, count=600, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=generator) @ torch.diag(
        torch.arange(1, d + 1, dtype=torch.float32) ** -0.7
    )


def test_top_subspace_of_a_wide_covariance_iterates_to_the_eigenvectors():
    x = stream(320).double()
    covariance = x.mT @ x
    assert subspace._iterated(covariance, 3) is not None
    found = linalg.top_subspace(covariance, 3)
    exact = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :3]
    torch.testing.assert_close(
        (found * exact).sum(0).abs(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12
    )
    rank_one = torch.outer(x[0], x[0])
    assert linalg.top_subspace(rank_one, 3).shape == (320, 1)
    assert linalg.top_subspace(torch.zeros(320, 320), 3).shape == (320, 0)


def test_top_subspace_converges_where_eigenvalues_lie_close_together():
    values = torch.cat([torch.tensor([1.0, 0.99, 0.98]), torch.linspace(0.8, 0.6, 997)]).double()
    vectors = torch.linalg.qr(torch.randn(1000, 1000, dtype=torch.float64)).Q
    covariance = vectors * values @ vectors.mT
    iterated = subspace._iterated(covariance, 3)
    assert iterated is not None
    torch.testing.assert_close(iterated[0], values[:3], rtol=1e-12, atol=0)
    found = linalg.top_subspace(covariance, 3)
    torch.testing.assert_close(
        (found * vectors[:, :3]).sum(0).abs(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("width", [1, 3, 4, 30, 257])
def test_the_products_of_columns_take_half_the_work_and_lose_nothing(width):
    x = torch.randn(70, width)
    found, exact = subspace._gram_of_columns(x), x.double().mT @ x.double()
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    torch.testing.assert_close(found, found.mT, rtol=1e-5, atol=1e-4)


def test_top_subspace_decomposes_fully_where_iterating_does_not_end():
    flat = torch.eye(320, dtype=torch.float64) + 1e-9 * torch.diag(torch.arange(320, dtype=torch.float64))
    assert subspace._iterated(flat, 3) is None
    found = linalg.top_subspace(flat, 2)
    torch.testing.assert_close(found.abs().argmax(0), torch.tensor([319, 318]))


def test_top_subspace_refuses_what_is_not_a_covariance():
    with pytest.raises(ValueError, match=r"shape \[3, 4\]"):
        linalg.top_subspace(torch.ones(3, 4), 2)
    with pytest.raises(ValueError, match="non-finite"):
        linalg.top_subspace(torch.full((3, 3), torch.nan), 2)
