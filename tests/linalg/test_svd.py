"""`svd_lowrank` against float64 LAPACK: the accepted errors on every spectrum, and what must not change a
result.
"""

from __future__ import annotations

import logging

import pytest
import torch
from spectra import LIMITS, SPECTRA, check, figures, matrix

from mingle import linalg
from mingle.linalg import subspace_iteration

R = 16  # with ℓ = 80, so that 200 columns iterate


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("accurate", (240, 200)),
        pytest.param("accurate", (180, 420), marks=pytest.mark.slow),
        ("fast", (200, 240)),
        pytest.param("fast", (500, 180), marks=pytest.mark.slow),
    ],
)
def test_the_accepted_errors_on_every_spectrum(spectrum, mode, shape):
    for seed in range(20):
        M = matrix(spectrum, *shape, R, seed)
        check(M, *linalg.svd_lowrank(M, R, mode=mode), LIMITS[mode])


@pytest.mark.parametrize("spectrum", ["0.9^k", "1/sqrt(k)", "cluster across r", "rank below r"])
def test_a_layer_of_the_usual_size(spectrum):
    M = matrix(spectrum, 768, 512, 64, 3)
    check(M, *linalg.svd_lowrank(M, 64), LIMITS["accurate"])


@pytest.mark.parametrize("shape", [(100, 90), (30, 200), (200, 17), (1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_small_matrices_are_decomposed_exactly(spectrum, shape):
    M = matrix(spectrum, *shape, R, 5)
    U, S, Vh = linalg.svd_lowrank(M, R)
    assert len(S) == min(R, *shape)
    found = figures(M, U, S, Vh)
    assert found.orthogonality <= 2e-6 and found.values <= 1e-5
    assert found.excess is None or found.excess <= 1e-6
    assert found.excess is not None or found.relative <= 2e-6


def test_fine_tuning_deltas():
    """The task vectors of the embedded suite, all layers of one task in one call."""
    from safetensors.torch import load_file

    from mingle.suites.glyphs import BASE, DATA

    base, tuned = (
        load_file(folder / "model.safetensors") for folder in (BASE, DATA / "experts" / "greek-inverted")
    )
    deltas = {name: tuned[name].float() - base[name].float() for name in tuned if name.endswith("fc1.weight")}
    triplets = linalg.svd_lowrank(list(deltas.values()), R, oversample=32, keys=list(deltas))
    for delta, *triplet in zip(deltas.values(), *triplets, strict=True):
        check(delta, *triplet, LIMITS["accurate"])


def test_duplicated_rows_and_columns():
    generator = torch.Generator().manual_seed(0)
    M = (
        torch.randint(-3, 4, (100, 5), generator=generator).float()
        @ torch.randint(-3, 4, (5, 110), generator=generator).float()
    )
    M = M.repeat(2, 2)  # exact dependence, without any rounding noise
    check(M, *linalg.svd_lowrank(M, R), LIMITS["accurate"])


def test_angles_where_there_is_a_gap():
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(n, 200, generator=generator, dtype=torch.float64)).Q for n in (240, 200)
    )
    sigma = torch.cat([torch.linspace(2, 1, R), torch.linspace(0.9, 0.1, 200 - R)]).double()
    U, _, Vh = linalg.svd_lowrank((left * sigma @ right.mT).float(), R)
    for found, true in ((U.double(), left[:, :R]), (Vh.mT.double(), right[:, :R])):
        sines = torch.linalg.svdvals(found - true @ (true.mT @ found))
        assert sines.max() < 1e-3


@pytest.mark.parametrize("seed", [1, 2])
def test_the_leading_part_itself_where_there_is_no_gap(seed):
    generator = torch.Generator().manual_seed(seed)
    structure = (
        torch.randn(512, 192, generator=generator)
        * torch.arange(1, 193).rsqrt()
        @ torch.randn(192, 512, generator=generator)
    )
    noise = torch.randn(512, 512, generator=generator)
    M = structure / structure.norm() + 0.6 * noise / noise.norm()
    U, S, Vh = linalg.svd_lowrank(M, 64)
    exact_U, exact_S, exact_Vh = torch.linalg.svd(M.double())
    assert exact_S[64] / exact_S[63] > 0.99
    exact = exact_U[:, :64] * exact_S[:64] @ exact_Vh[:64]
    assert (U.double() * S @ Vh.double() - exact).norm() <= 1e-4 * exact.norm()


# --- what must not matter ---


def test_scaling_by_powers_of_two_changes_no_bit_of_the_vectors():
    M = matrix("1/k", 240, 200, R, 0)
    U, S, Vh = linalg.svd_lowrank(M, R)
    for power in (-40, 40, -100, 100):
        scaled = linalg.svd_lowrank(torch.ldexp(M, torch.tensor(power)), R)
        assert torch.equal(scaled[0], U) and torch.equal(scaled[2], Vh)
        assert torch.equal(scaled[1], torch.ldexp(S, torch.tensor(power)))


def test_the_transpose_has_the_transposed_triplets():
    M = matrix("1/k", 240, 200, R, 0)
    U, S, Vh = linalg.svd_lowrank(M, R)
    U2, S2, Vh2 = linalg.svd_lowrank(M.mT, R)
    torch.testing.assert_close(S2, S, rtol=1e-6, atol=0)
    torch.testing.assert_close((U2 * S2 @ Vh2).mT, U * S @ Vh, rtol=0, atol=1e-6)


def test_neither_the_batch_nor_the_place_in_it_matters():
    matrices = [
        matrix("1/k", 240, 200, R, 0),
        matrix("flat", 90, 100, R, 1),
        matrix("0.9^k", 240, 200, R, 2),
        matrix("1/k", 90, 100, R, 3),
    ]
    keys = ["a", "b", "c", "d"]
    together = linalg.svd_lowrank(matrices, R, keys=keys)
    turned = linalg.svd_lowrank(matrices[::-1], R, keys=keys[::-1])
    stacked = linalg.svd_lowrank(torch.stack(matrices[::2]), R, keys=keys[::2])
    for i, (M, key) in enumerate(zip(matrices, keys, strict=True)):
        alone = linalg.svd_lowrank(M, R, keys=[key])
        for part in range(3):
            assert torch.equal(together[part][i], alone[part])
            assert torch.equal(turned[part][3 - i], alone[part])
            if i % 2 == 0:
                assert torch.equal(stacked[part][i // 2], alone[part])


def test_seeds_and_keys_choose_the_start():
    M = matrix("1/sqrt(k)", 240, 200, R, 0)
    first = linalg.svd_lowrank(M, R, power_iters=0)
    assert torch.equal(first[0], linalg.svd_lowrank(M, R, power_iters=0)[0])
    assert not torch.equal(first[0], linalg.svd_lowrank(M, R, power_iters=0, seed=1)[0])
    assert not torch.equal(first[0], linalg.svd_lowrank(M, R, power_iters=0, keys=["q"])[0])


def test_global_settings_neither_matter_nor_change():
    M = matrix("0.9^k", 240, 200, R, 0)
    U, S, Vh = linalg.svd_lowrank(M, R)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            again = linalg.svd_lowrank(M.clone().requires_grad_(), R)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    assert all(torch.equal(a, b) for a, b in zip(again, (U, S, Vh), strict=True))
    assert not again[0].requires_grad


@pytest.mark.parametrize("shape", [(3, 240, 200), (3, 100, 320), (2, 40, 30)])
def test_a_batch_at_once_equals_one_by_one(shape):
    """The form in which GPUs compute."""
    M = torch.stack(
        [matrix(spectrum, *shape[1:], R, 0) for spectrum in ("1/k", "rank below r", "zero")[: shape[0]]]
    ).double()
    plan, keys = subspace_iteration.Iteration(R, R + 64, 8, 0), ["a", "b", "c"][: shape[0]]
    at_once = subspace_iteration.leading(M.float(), M, plan, keys)
    for i, key in enumerate(keys):
        U, S, Vh, residuals, beyond = subspace_iteration.leading(M[i].float(), M[i], plan, [key])
        torch.testing.assert_close(at_once[1][i], S, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(at_once.beyond[i], beyond, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(at_once.residuals[i], residuals, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            (at_once[0][i] * at_once[1][i].unsqueeze(-2)) @ at_once[2][i], U * S @ Vh, rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            at_once[0][i].mT @ at_once[0][i], torch.eye(len(S), dtype=torch.float64), rtol=0, atol=1e-10
        )


# --- certificates ---


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


# --- inputs of every kind ---


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
