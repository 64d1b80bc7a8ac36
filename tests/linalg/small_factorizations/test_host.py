"""csrc compiled by g++: the algorithms that the GPU runs, on one thread."""

from __future__ import annotations

import factorization_checks as checks
import pytest
import torch
from host_build import Host

from mingle.ops import small_factorizations as plain


@pytest.mark.parametrize("check", checks.ALL, ids=lambda check: check.__name__)
def test_on_the_host(check, host: Host) -> None:
    check(host)


@pytest.mark.parametrize("check", checks.ALL, ids=lambda check: check.__name__)
def test_plain_torch(check) -> None:
    check(plain)


def test_every_size(host: Host) -> None:
    """n = 1 … 128: the ends of panels, tiles and tournaments."""
    for n in range(1, 129):
        Y = torch.randn(1, n + 5, n, dtype=torch.float64)
        Y[0, :, n // 2] = Y[0, :, 0]
        G = Y.mT @ Y
        inverse, flags = host.cholesky_inverse(G, checks.shift(n + 5, n))
        assert flags.item() == (1 if n > 1 else 0)
        expected, plain_flags = plain.cholesky_inverse(G, checks.shift(n + 5, n))
        assert torch.equal(flags, plain_flags)
        assert (inverse - expected).abs().max() <= 1e-6 * expected.abs().max()
        values, W, flags = host.eigh(G)
        assert 0 < flags.item() <= 15
        assert (W * values.unsqueeze(1) @ W.mT - G).abs().max() <= 1e-13 * G.abs().max()
        assert (W.mT @ W - torch.eye(n)).abs().max() < 1e-14


def test_agrees_with_plain_torch(host: Host) -> None:
    for n in checks.SIZES:
        names, G = checks.grams(n)
        for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            ours, theirs = (
                ops.cholesky_inverse(G, checks.shift(2 * n + 3, n), dtype) for ops in (host, plain)
            )
            for name, a, b, flags in zip(
                names, ours[0], theirs[0], zip(ours[1], theirs[1], strict=True), strict=True
            ):
                near_the_limit = ("rank deficient", "graded spectrum")  # where pivots go either way
                assert flags[0] == flags[1] or name in near_the_limit, (name, n)
                # of condition 1e4 at most
                if name in ("plain", "orthonormal", "cluster", "zero columns", "zero", "huge", "tiny"):
                    assert (a - b).abs().max() <= limit * b.abs().max(), (name, n)
    for M in (torch.randn(3, 50, 70), torch.randn(2, 5, 6, dtype=torch.float64) * 1e-310):
        for a, b in zip(host.rescale(M), plain.rescale(M), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 64, 256])
def test_chunks_change_nothing(chunks: int, host: Host) -> None:
    M = torch.randn(2, 13, 17)
    M[1, 12, 15], M[1, 3, 4] = torch.nan, torch.inf
    for a, b in zip(host.rescale(M, chunks), plain.rescale(M), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    padded = torch.randn(2, 13, 20)[:, :, 1:18]
    assert torch.equal(host.rescale(padded, chunks)[0], plain.rescale(padded)[0])


def test_large_matrices_get_several_chunks(host: Host) -> None:
    M = torch.zeros(1, 700, 600)
    M[0, 650, 3] = -3.0
    scaled, exponent, _, _ = host.rescale(M)
    assert exponent.item() == 2 and scaled[0, 650, 3] == -0.75


def test_small_eigenvalues_of_graded_columns_are_relatively_accurate(host: Host) -> None:
    """Over 28 orders of magnitude, where a solver that tridiagonalises returns noise after 16."""
    n, length = 24, 2.0 ** (-2 * torch.arange(24, dtype=torch.float64))
    core = torch.randn(60, n, dtype=torch.float64)
    core = core.mT @ core / 60
    values = host.eigh((core * length * length[:, None])[None])[0][0]
    # the determinant of leading blocks, in exact scaling, is a product of eigenvalues to first order; their
    # ratio is compared
    scaled = values / length.square()
    pivots = torch.linalg.cholesky(core).diagonal().square()
    assert ((scaled / pivots).log().abs() < 0.5).all()


@pytest.mark.parametrize(
    ("bytes_of_a_block", "widest"), [(232_448, 128), (166_912, 128), (101_376, 111), (0, 0)]
)
def test_the_widest_matrix_is_what_a_block_has_room_for(bytes_of_a_block, widest, host):
    """99 KB on an A10, an L40S and an RTX 4090."""
    assert host.widest_eigh(bytes_of_a_block) == widest
