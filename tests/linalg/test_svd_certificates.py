"""What `svd_lowrank` tells of its result, and that it works on until that suffices."""

from __future__ import annotations

import logging

import pytest
import torch
from spectra import LIMITS, check, matrix

from mingle import linalg

R = 16  # with ℓ = 80, so that 320 columns iterate


def step(high: int, low: float, count: int) -> torch.Tensor:
    """`high` ones, then `count` − `high` times `low`."""
    return torch.where(torch.arange(count) < high, 1.0, low).double()


CLOSE = {
    "a hundredth apart": lambda count: step(R - 4, 0.99, count),
    "a tenth apart": lambda count: step(R - 4, 0.9, count),
    "a ten-thousandth apart": lambda count: step(R - 4, 0.9999, count),
    "falling evenly": lambda count: 1 - 0.9 * torch.arange(1, count + 1).double() / count,
    "as of noise": lambda count: torch.linalg.svdvals(
        torch.randn(count, count, generator=torch.Generator().manual_seed(1)).double()
    ),
    "all equal": lambda count: torch.ones(count).double(),
}


def with_values(values: torch.Tensor, seed: int) -> torch.Tensor:
    """A square fp32 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double())[0]
        for _ in range(2)
    )
    return (left * values @ right.mT).float()


@pytest.mark.parametrize("values", CLOSE)
@pytest.mark.parametrize("mode", ["accurate", "fast"])
def test_singular_values_that_are_close_at_the_edge(values, mode):
    """Where a fixed number of rounds falls short."""
    for seed in range(3):
        M = with_values(CLOSE[values](320), seed)
        check(M, *linalg.svd_lowrank(M, R, mode=mode), LIMITS[mode])


@pytest.mark.parametrize("values", CLOSE)
def test_a_certificate_tells_what_a_few_rounds_lack(values):
    """Within a factor of four, and residuals are those of the result."""
    M = with_values(CLOSE[values](320), 0)
    U, S, Vh, certificate = linalg.svd_lowrank(M, R, power_iters=6, info=True)
    exact = torch.linalg.svdvals(M.double())
    residuals = (M.double() @ Vh.double().mT - U.double() * S.double()).norm(dim=0)
    torch.testing.assert_close(certificate.residuals.double(), residuals, rtol=1e-3, atol=1e-6)
    best, left = (exact[:R] ** 2).sum(), (exact[R:] ** 2).sum().sqrt()
    deficit = float((best - (S.double() ** 2).sum()) / best)
    excess = float((M.double() - (U * S @ Vh).double()).norm() / left - 1)
    assert deficit / 4 - 1e-6 <= float(certificate.deficit) <= 4 * deficit + 1e-6
    assert excess / 4 - 1e-6 <= float(certificate.excess) <= 4 * excess + 1e-6
    assert float(linalg.svd_lowrank(M, R, info=True)[3].deficit) <= 1e-6


def test_more_rounds_follow_where_they_suffice_and_an_exact_decomposition_where_not(caplog):
    spread, close = (with_values(CLOSE[name](320), 0) for name in ("falling evenly", "a hundredth apart"))
    with caplog.at_level(logging.DEBUG):
        linalg.svd_lowrank([spread, close], 4, keys=["spread", "close"])
    told = [record.getMessage() for record in caplog.records]
    assert any("matrix spread [320, 320]: 1" in text and "rounds instead of 10" in text for text in told), (
        told
    )
    assert any("matrix close [320, 320]: singular values too close" in text for text in told), told
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        linalg.svd_lowrank(close, 4, power_iters=10)  # as many as were asked for
        linalg.svd_lowrank(matrix("1/k", 240, 200, R, 0), R)
    assert not caplog.records


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_certificates_have_the_shape_of_the_batch(shape):
    M = matrix("1/k", 240, 200, R, 0).expand(*shape, 240, 200)
    *_, S, _, certificate = linalg.svd_lowrank(M, R, info=True)
    assert certificate.residuals.shape == S.shape == (*shape, R)
    assert certificate.deficit.shape == certificate.excess.shape == shape
    listed = linalg.svd_lowrank([M.reshape(-1, 240, 200)[0], torch.ones(3, 2)], 2, info=True)[3]
    assert [one.residuals.shape for one in listed] == [(2,), (2,)]
    assert float(listed[1].residuals.max()) == float(listed[1].deficit) == float(listed[1].excess) == 0


def test_residuals_scale_with_the_matrix():
    M = with_values(CLOSE["a tenth apart"](320), 0)
    small, large = (linalg.svd_lowrank(M * factor, R, power_iters=4, info=True)[3] for factor in (1, 2.0**30))
    assert torch.equal(small.residuals * 2.0**30, large.residuals)
    assert torch.equal(small.deficit, large.deficit) and torch.equal(small.excess, large.excess)
