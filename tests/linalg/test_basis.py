"""Orthonormal bases: rank-revealing extension, orthonormal rows, random starts."""

from __future__ import annotations

import pytest
import torch

from mingle import linalg
from mingle.linalg import basis, sketch


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(
        torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ).Q


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
    torch.testing.assert_close(
        (linalg.extend_basis(old, new) * exact).sum(0).abs(), torch.ones(7, dtype=torch.float64)
    )


def test_extend_basis_ignores_scale_and_stops_at_the_whole_space():
    basis = torch.empty(5, 0, dtype=torch.float64)
    for scale in (1e-12, 1.0, 1e12):
        basis = linalg.extend_basis(basis, scale * torch.randn(5, 3, dtype=torch.float64))
    assert basis.shape == (5, 5)
    assert linalg.extend_basis(basis, torch.randn(5, 2, dtype=torch.float64)).shape == (5, 5)
    assert linalg.extend_basis(basis[:, :1], torch.zeros(5, 2, dtype=torch.float64)).shape == (5, 1)
    assert linalg.extend_basis(basis[:, :1].float(), torch.randn(5, 2)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["generic", "graded", "deficient", "equal", "zero", "partly zero"])
def test_orthonormal_rows_whatever_the_rank(kind):
    rows = torch.randn(2, 12, 40, dtype=torch.float64)
    if kind == "graded":
        rows *= torch.logspace(0, -12, 12, dtype=torch.float64)[:, None]
    elif kind == "deficient":
        rows = torch.randn(2, 12, 3, dtype=torch.float64) @ torch.randn(2, 3, 40, dtype=torch.float64)
    elif kind == "equal":
        rows[:] = 1.0
    elif kind == "zero":
        rows.zero_()
    elif kind == "partly zero":
        rows[:, ::2] = 0
    for matrix in (rows, rows[0]):
        found = basis.orthonormal(matrix, 0, ["a", "b"][: len(matrix) if matrix.dim() == 3 else 1])
        assert basis.defect(found).max() < 1e-12
        outside = matrix - matrix @ found.mT @ found
        assert outside.norm() <= 1e-7 * matrix.norm()


def test_random_starts_are_standard_normal_and_independent_of_the_batch():
    device = torch.device("cpu")
    numbers = sketch.gaussian(7, ["a", "b", 3], 100, 200, device, torch.float64)
    assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 1) < 0.02
    assert abs((numbers**4).mean() - 3) < 0.15
    assert numbers.abs().max() < 6 and numbers.flatten().unique().numel() == numbers.numel()
    correlations = torch.corrcoef(numbers.flatten(1)) - torch.eye(3, dtype=torch.float64)
    assert correlations.abs().max() < 0.03
    assert torch.equal(sketch.gaussian(7, [3, "b"], 100, 200, device, torch.float64), numbers[[2, 1]])
    assert not torch.equal(sketch.gaussian(8, ["a"], 100, 200, device, torch.float64)[0], numbers[0])
