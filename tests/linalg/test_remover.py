"""Taking a block of singular directions out of a matrix whose rows come block by block."""

from __future__ import annotations

import pytest
import torch

from mingle import linalg
from mingle.linalg.spectrum import remover


def pair(m, n, rank=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(m + n)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    merged = draw(m, n) if rank is None else draw(m, rank) @ draw(rank, n)
    return merged.to(dtype), draw(m, n).to(dtype)


@pytest.mark.parametrize("drop_diagonal", [False, True])
@pytest.mark.parametrize("size", [1, 7, 100], ids="blocks of {}".format)
@pytest.mark.parametrize(("m", "n", "rank"), [(40, 12, None), (12, 12, None), (40, 12, 5), (40, 1, None)])
@pytest.mark.parametrize("leading", [0, 1, 4])
def test_it_removes_what_project_out_removes(m, n, rank, leading, size, drop_diagonal):
    merged, delta = pair(m, n, rank)
    count = min(leading, n)
    blocks = zip(merged.split(size), delta.split(size), strict=True)
    K = remover(blocks, lambda S: count, drop_diagonal=drop_diagonal)
    U, S, Vh = linalg.gram_svd(merged)
    expected = linalg.project_out(delta, U, S, Vh, count, drop_diagonal=drop_diagonal)
    assert K.dtype == torch.float64 and K.shape == (n, n)
    torch.testing.assert_close(delta - merged @ K, expected, rtol=1e-7, atol=1e-7)


def test_the_count_is_asked_for_with_all_singular_values():
    merged, delta = pair(30, 9)
    asked = []
    remover([(merged, delta)], lambda S: asked.append(S) or 0)
    torch.testing.assert_close(asked[0], torch.linalg.svdvals(merged))


def test_of_a_matrix_of_zeros_nothing_is_removed():
    delta = torch.randn(8, 3)
    assert not remover([(torch.zeros(8, 3), delta)], lambda S: 2).any()


def test_half_precision_is_multiplied_in_float64():
    merged, delta = pair(50, 6, dtype=torch.bfloat16)
    exact = remover([(merged.double(), delta.double())], lambda S: 2)
    assert torch.equal(remover([(merged, delta)], lambda S: 2), exact)
