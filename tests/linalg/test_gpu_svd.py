"""`svd_lowrank` on a GPU, with the kernels of ``mingle._C`` and without."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from spectra import LIMITS, SPECTRA, check, matrix

from mingle import linalg
from mingle.linalg import subspace_iteration
from mingle.methods.experts import make_experts
from mingle.ops import extension

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")

R = 16  # with ℓ = 80, so that 200 columns iterate
KERNELS = pytest.param(
    "extension",
    marks=pytest.mark.skipif(
        torch.cuda.is_available() and extension.why_not(DEVICE) is not None,
        reason="mingle._C cannot serve this GPU: see python -m mingle env",
    ),
)
BACKENDS = ("auto", "library", KERNELS)


def layers(count: int = 4, m: int = 240, n: int = 200, rank: int = R) -> torch.Tensor:
    names = ("1/k", "0.98^k", "rank below r", "cluster across r", "1/sqrt(k)", "zero")
    return torch.stack([matrix(names[i % len(names)], m, n, rank, i) for i in range(count)]).to(DEVICE)


def product(U, S, Vh):
    return U * S.unsqueeze(-2) @ Vh


# --- accuracy ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("accurate", (240, 200)),
        ("accurate", (180, 420)),
        ("fast", (200, 240)),
        ("fast", (500, 180)),
        ("fast", (100, 90)),
    ],
)
def test_the_accepted_errors_on_every_spectrum(spectrum, mode, shape, backend):
    """Twenty seeds in one batch, each with a start of its own."""
    M = torch.stack([matrix(spectrum, *shape, R, seed) for seed in range(20)])
    U, S, Vh = linalg.svd_lowrank(M.to(DEVICE), R, mode=mode, keys=range(20), backend=backend)
    assert U.device == S.device == Vh.device == torch.device("cuda", torch.cuda.current_device())
    for i in range(20):
        check(M[i], U[i], S[i], Vh[i], LIMITS[mode])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["accurate", "fast"])
@pytest.mark.parametrize("spectrum", ["0.9^k", "1/sqrt(k)", "cluster across r", "rank below r"])
def test_a_layer_of_the_usual_size(spectrum, mode, backend):
    """Blocks of 128 and 96, the widest that the kernels meet."""
    M = matrix(spectrum, 768, 512, 64, 3)
    check(M, *linalg.svd_lowrank(M.to(DEVICE), 64, mode=mode, backend=backend), LIMITS[mode])


def test_blocks_wider_than_the_kernels_take():
    M = matrix("1/sqrt(k)", 600, 560, 100, 0)
    check(M, *linalg.svd_lowrank(M.to(DEVICE), 100), LIMITS["accurate"])
    with pytest.raises(RuntimeError, match="up to 128, not 164"):
        linalg.svd_lowrank(M.to(DEVICE), 100, backend="extension")


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-9), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_dtypes(dtype, atol):
    M = matrix("0.9^k", 240, 200, R, 0, dtype)
    U, S, Vh = linalg.svd_lowrank(M.to(DEVICE), R)
    assert U.dtype == S.dtype == Vh.dtype == dtype
    torch.testing.assert_close(S.cpu().double(), torch.linalg.svdvals(M.double())[:R], rtol=atol, atol=atol)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (100, 90), (1, 1), (1, 40), (40, 1), (500, 33)])
def test_small_matrices_are_decomposed_exactly(shape):
    M = matrix("1/k", *shape, R, 5)
    check(M, *linalg.svd_lowrank(M.to(DEVICE), R), LIMITS["accurate"])


def test_powers_of_two_strides_and_empty_batches():
    M = layers(1)[0]
    U, S, Vh = linalg.svd_lowrank(M, R)
    for power in (-100, -40, 40, 100):
        scaled = linalg.svd_lowrank(torch.ldexp(M, torch.tensor(power, device=DEVICE)), R)
        assert torch.equal(scaled[0], U) and torch.equal(scaled[2], Vh)
        assert torch.equal(scaled[1], torch.ldexp(S, torch.tensor(power, device=DEVICE)))
    padded = torch.full((240, 3, 200), torch.nan, device=DEVICE)
    padded[:, 1] = M
    torch.testing.assert_close(linalg.svd_lowrank(padded[:, 1], R)[1], S)
    torch.testing.assert_close(linalg.svd_lowrank(M.mT, R)[1], S, rtol=1e-6, atol=0)
    assert [part.shape for part in linalg.svd_lowrank(torch.empty(0, 50, 40, device=DEVICE), 3)] == [
        (0, 50, 3),
        (0, 3),
        (0, 3, 40),
    ]


# --- what must not matter ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_equals_its_matrices_alone(backend):
    """But for the kernels that a library chooses by the size of the batch."""
    M = layers()
    together = linalg.svd_lowrank(M, R, keys="abcd", backend=backend)
    for i, key in enumerate("abcd"):
        U, S, Vh = linalg.svd_lowrank(M[i], R, keys=[key], backend=backend)
        torch.testing.assert_close(together[1][i], S, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            product(*(part[i] for part in together)), product(U, S, Vh), rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_of_mixed_shapes_in_any_order(backend):
    matrices = [*layers(3), *layers(2, 90, 100), *layers(2, 128, 400), layers(1, 20, 12)[0]]
    keys = [f"layers.{i}" for i in range(len(matrices))]
    found = linalg.svd_lowrank(matrices, R, keys=keys, backend=backend)
    turned = linalg.svd_lowrank(matrices[::-1], R, keys=keys[::-1], backend=backend)
    for i, M in enumerate(matrices):
        U, S, Vh = (part[i] for part in found)
        assert (U.shape, Vh.shape) == ((len(M), len(S)), (len(S), M.shape[1]))
        check(M, U, S, Vh, LIMITS["accurate"])
        torch.testing.assert_close(turned[1][-1 - i], S, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [KERNELS])
def test_the_kernels_agree_with_plain_torch_and_with_the_cpu(backend):
    M = layers()
    found = linalg.svd_lowrank(M, R, backend=backend)
    for other in (
        linalg.svd_lowrank(M, R, backend="library"),
        linalg.svd_lowrank(M.cpu(), R),
        linalg.svd_lowrank(M, R, backend="lapack"),
    ):
        U, S, Vh = (part.to(DEVICE) for part in other)
        torch.testing.assert_close(found[1], S, rtol=1e-4, atol=1e-7)
        # those with a gap after r
        torch.testing.assert_close(product(*found)[:2], product(U, S, Vh)[:2], rtol=0, atol=2e-5)


def test_tf32_and_autocast_neither_matter_nor_change():
    M = layers()
    expected = linalg.svd_lowrank(M, R)
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"  # put back by the fixture of all tests
    with torch.autocast("cuda", torch.bfloat16), torch.enable_grad():
        found = linalg.svd_lowrank(M.clone().requires_grad_(), R)
    assert matmul.fp32_precision == "tf32"
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not found[0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_bits_in_fifty_runs(backend):
    M = layers(6)
    first = linalg.svd_lowrank(M, R, seed=3, keys=range(6), backend=backend)
    for _ in range(50):
        again = linalg.svd_lowrank(M, R, seed=3, keys=range(6), backend=backend)
        assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))


# --- the host ---


@pytest.mark.parametrize("backend", [KERNELS])
@pytest.mark.parametrize("shape", [(240, 200), (600, 200), (200, 600)])
def test_the_iteration_never_waits_for_the_device(shape, backend):
    M = layers(3, *shape)
    plan, keys = subspace_iteration.Iteration(R, R + 64, 8, 0), ["a", "b", "c"]
    wide = M.double()
    expected = subspace_iteration.leading(M, wide, plan, keys)  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = subspace_iteration.leading(M, wide, plan, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_runs_on_the_current_stream(backend):
    M = layers()
    expected = linalg.svd_lowrank(M, R, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.full_like(M, torch.nan)
        # cycles, some ten milliseconds: a kernel on another stream would come before the copy
        torch.cuda._sleep(20_000_000)
        late.copy_(M)
        found = linalg.svd_lowrank(late, R, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, "lapack"])
def test_a_matrix_with_nan_is_named_with_its_first_bad_entry(backend):
    M = layers()
    M[2, 100, 7], M[2, 150, 3] = torch.inf, torch.nan
    keys = [f"layers.{i}.fc1" for i in range(4)]
    with pytest.raises(
        ValueError, match=r"'layers.2.fc1' \[240, 200\] has non-finite entries: 2, the first at \[100, 7\]"
    ):
        linalg.svd_lowrank(M, R, keys=keys, backend=backend)
    with pytest.raises(ValueError, match="'layers.2.fc1'"):
        make_experts(dict(zip(keys, M, strict=True)), dict.fromkeys(keys, ()), R)


def test_disabled_kernels_are_replaced_by_plain_torch():
    program = f"""
import torch
from mingle import linalg
from mingle.ops import extension
M = torch.randn(240, 200, generator=torch.Generator().manual_seed(0)).cuda()
assert "MINGLE_EXTENSION=0" in extension.why_not(M.device), extension.why_not(M.device)
U, S, Vh = linalg.svd_lowrank(M, {R})
torch.testing.assert_close(S, torch.linalg.svdvals(M.double())[:{R}].float(), rtol=1e-4, atol=0)
try:
    linalg.svd_lowrank(M, {R}, backend="extension")
except RuntimeError as error:
    assert "MINGLE_EXTENSION=0" in str(error)
else:
    raise SystemExit("backend='extension' ran although it is disabled")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"MINGLE_EXTENSION": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_list_may_lie_on_several_devices():
    M = matrix("1/k", 240, 200, R, 0)
    U, S, Vh = linalg.svd_lowrank([M, M.to(DEVICE)], R, keys=["a", "a"])
    assert [part.device.type for part in S] == ["cpu", "cuda"] and U[1].is_cuda and Vh[1].is_cuda
    torch.testing.assert_close(S[1].cpu(), S[0], rtol=1e-6, atol=0)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="one GPU: no tensor can be elsewhere than on the current device"
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_need_not_be_on_the_current_device(backend):
    M = layers()
    with torch.cuda.device(0):
        found = linalg.svd_lowrank(M.to("cuda:1"), R, backend=backend)
        assert torch.cuda.current_device() == 0
    assert found[0].device == torch.device("cuda:1")
    torch.testing.assert_close(
        found[1].to(DEVICE), linalg.svd_lowrank(M, R, backend=backend)[1], rtol=1e-6, atol=1e-7
    )
