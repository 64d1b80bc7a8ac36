"""`svd_lowrank` against float64 LAPACK: the accepted errors on every spectrum, and what must not change a
result.
"""

from __future__ import annotations

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
def test_a_batch_at_once_equals_one_by_one(shape, monkeypatch):
    """The form in which GPUs compute."""
    monkeypatch.setenv("MINGLE_CPU_GEMM", "mkl")  # which multiplies batches in any case
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
