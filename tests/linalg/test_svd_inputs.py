"""`svd_lowrank` of inputs of every kind, and what it refuses."""

from __future__ import annotations

import logging

import pytest
import torch
from spectra import LIMITS, check, matrix

from mingle import linalg
from mingle.linalg import subspace_iteration

R = 16  # with ℓ = 80, so that 200 columns iterate


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-9), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_dtypes(dtype, atol):
    M = matrix("0.9^k", 240, 200, R, 0, dtype)
    U, S, Vh = linalg.svd_lowrank(M, R)
    assert U.dtype == S.dtype == Vh.dtype == dtype
    exact = torch.linalg.svdvals(M.double())[:R]
    torch.testing.assert_close(S.double(), exact, rtol=atol, atol=atol)


def test_strides_and_extremes_of_magnitude():
    M = matrix("1/k", 240, 200, R, 0)
    expected = linalg.svd_lowrank(M, R)[1]
    padded = torch.full((240, 3, 200), torch.nan)
    padded[:, 1] = M
    torch.testing.assert_close(linalg.svd_lowrank(padded[:, 1], R)[1], expected)
    assert linalg.svd_lowrank(torch.ones(1, 1).expand(300, 200), R)[1].tolist()[0] == pytest.approx(
        (300 * 200) ** 0.5
    )
    assert linalg.svd_lowrank(M * 1e38, R)[1].isfinite().all()
    tiny = linalg.svd_lowrank(M * 1e-38, R)  # entries are subnormal
    check(M * 1e-38, *tiny, LIMITS["accurate"]._replace(values=1e-3, excess=1.0, deficit=1e-3))


def test_empty_batches_lists_and_matrices():
    assert [part.shape for part in linalg.svd_lowrank(torch.empty(0, 5, 4), 3)] == [
        (0, 5, 3),
        (0, 3),
        (0, 3, 4),
    ]
    assert [part.shape for part in linalg.svd_lowrank(torch.empty(2, 5, 0), 3)] == [
        (2, 5, 0),
        (2, 0),
        (2, 0, 0),
    ]
    assert linalg.svd_lowrank([], 3) == ([], [], [])
    U, S, Vh = linalg.svd_lowrank(torch.randn(2, 3, 6, 4), 2)
    assert (U.shape, S.shape, Vh.shape) == ((2, 3, 6, 2), (2, 3, 2), (2, 3, 2, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(rank=0), ValueError, "rank=0"),
        (dict(rank=2, mode="quick"), ValueError, "mode='quick': expected one of accurate, fast"),
        (dict(rank=2, backend="magma"), ValueError, "backend='magma'"),
        (dict(rank=2, oversample=-1), ValueError, "oversample=-1"),
        (dict(rank=2, power_iters=-1), ValueError, "power_iters=-1"),
        (dict(rank=2, keys=["a", "b"]), ValueError, "2 keys for 1 matrices"),
        (dict(rank=2, M=torch.ones(4)), TypeError, r"shape \[4\]"),
        (dict(rank=2, M=torch.ones(4, 4, dtype=torch.int64)), TypeError, "int64"),
        (dict(rank=2, M=[torch.ones(2, 4, 4)]), TypeError, r"shape \[2, 4, 4\]"),
        (dict(rank=2, backend="extension"), RuntimeError, "backend='extension' cannot run: "),
        (dict(rank=65, backend="extension"), RuntimeError, "rank . oversample up to 128, not 129"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        linalg.svd_lowrank(**{"M": torch.ones(4, 4)} | arguments)


def test_a_matrix_with_nan_is_named_with_its_first_bad_entry():
    good, bad = torch.ones(3, 4), torch.ones(3, 4)
    bad[1, 2], bad[2, 0] = torch.nan, -torch.inf
    with pytest.raises(
        ValueError, match=r"matrix 'layers.7.fc1' \[3, 4\] has non-finite entries: 2, the first at \[1, 2\]"
    ):
        linalg.svd_lowrank([good, bad], 2, keys=["layers.6.fc1", "layers.7.fc1"])
    with pytest.raises(ValueError, match=r"matrix 1 of 2 \[3, 4\]"):
        linalg.svd_lowrank(torch.stack([good, bad]), 2)


def test_an_svd_that_does_not_converge_is_named_and_decomposed_fully(monkeypatch, caplog):
    M = matrix("1/k", 240, 200, R, 0)
    monkeypatch.setattr(subspace_iteration, "orthonormal", lambda rows, *_: torch.full_like(rows, torch.nan))
    with caplog.at_level(logging.WARNING):
        U, S, Vh = linalg.svd_lowrank(M, R, keys=["layers.3.out_proj"])
    check(M, U, S, Vh, LIMITS["accurate"])
    assert "layers.3.out_proj" in caplog.text


def test_the_full_decomposition_on_request():
    M = matrix("1/sqrt(k)", 240, 200, R, 0)
    U, S, Vh = linalg.svd_lowrank(M, R, backend="lapack")
    check(M, U, S, Vh, LIMITS["accurate"]._replace(excess=1e-7, values=1e-6))


def test_the_operator_and_torch_compile():
    M = matrix("1/k", 2 * 240, 200, R, 0).view(2, 240, 200)
    torch.library.opcheck(
        torch.ops.mingle.svd_lowrank.default, (M, R, R + 64, 8, 0, 1e-6, 1e-5, "auto", "a\nb")
    )

    def leading(M):
        U, S, Vh = linalg.svd_lowrank(M, R)
        return U * S.unsqueeze(-2) @ Vh

    torch.testing.assert_close(torch.compile(leading, fullgraph=True, backend="aot_eager")(M), leading(M))
