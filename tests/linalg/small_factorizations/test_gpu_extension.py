"""The kernels of ``mingle._C`` on a GPU: the checks of the host, equal bits, streams, devices, CUDA graphs,
compute-sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factorization_checks as checks
import pytest
import torch
from torch import Tensor

from mingle.ops import extension, small_kernels
from mingle.ops import small_factorizations as small

DEVICE = torch.device("cuda", 0)
WHY_NOT = extension.why_not(DEVICE) if torch.cuda.is_available() else "no CUDA GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

F64 = torch.float64


def uploaded(tensor: Tensor, device: torch.device = DEVICE) -> Tensor:
    """The same values with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


class Gpu:
    """`small_factorizations` for CPU tensors, computed on a GPU."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            moved = [
                uploaded(argument) if isinstance(argument, Tensor) else argument for argument in arguments
            ]
            results = getattr(small, name)(*moved)
            if results is None:  # in place
                for argument, copy in zip(arguments, moved, strict=True):
                    argument.copy_(copy)
                return None
            return tuple(result.cpu() for result in results) if isinstance(results, tuple) else results.cpu()

        return call


def batch(count: int = 200, n: int = 128) -> Tensor:
    Y = torch.randn(count, n + 40, n, dtype=F64)
    Y[::7, :, n // 2] = Y[::7, :, 0]
    return (Y.mT @ Y).to(DEVICE)


OPERATIONS: dict[str, Callable[[torch.device], tuple[Tensor, ...]]] = {
    "cholesky_inverse": lambda device: small.cholesky_inverse(batch(8).to(device), 1e-9),
    "cholesky_inverse in float32": lambda device: small.cholesky_inverse(
        batch(8).to(device), 1e-9, torch.float32
    ),
    "eigh": lambda device: small.eigh(batch(8).to(device)),
    "rescale": lambda device: small.rescale(torch.randn(3, 500, 700).to(device)),
    "effective_rank": lambda device: (small.effective_rank(torch.rand(5, 300, dtype=F64).to(device)),),
}


@pytest.mark.parametrize("check", checks.ALL, ids=lambda check: check.__name__)
def test_the_checks_of_the_host(check: Callable[[Any], None]) -> None:
    check(Gpu())


def test_every_size() -> None:
    for n in range(1, 129):
        Y = torch.randn(2, n + 5, n, dtype=F64)
        G = (Y.mT @ Y).to(DEVICE)
        inverse, flags = small.cholesky_inverse(G, checks.shift(n + 5, n))
        identity = inverse.mT @ G @ inverse
        assert not flags.any() and (identity - torch.eye(n, device=DEVICE)).abs().max() < 1e-6
        values, W, flags = small.eigh(G)
        assert (flags > 0).all() and (W.mT @ W - torch.eye(n, device=DEVICE)).abs().max() < 1e-14
        assert (W * values.unsqueeze(1) @ W.mT - G).abs().max() <= 1e-13 * G.abs().max() * max(n, 10)


def test_two_hundred_matrices_agree_with_plain_torch() -> None:
    G = batch()
    ours, theirs = small.cholesky_inverse(G, 1e-9), small.cholesky_inverse(G.cpu(), 1e-9)
    assert torch.equal(ours[1].cpu(), theirs[1]) and (ours[1] == 1).sum() == len(range(0, 200, 7))
    plain = (theirs[1] == 0).nonzero().squeeze(1)
    assert (ours[0].cpu()[plain] - theirs[0][plain]).abs().max() <= 1e-6 * theirs[0][plain].abs().max()
    values, W, flags = small.eigh(G)
    assert (flags > 0).all()
    assert (values.cpu() - small.eigh(G.cpu())[0]).abs().max() <= 1e-13 * values.max()
    assert (W.mT @ W - torch.eye(128, device=DEVICE)).abs().max() < 1e-14


def test_large_matrices_and_long_rows() -> None:
    for M in (
        torch.randn(2, 4096, 3000),
        torch.randn(1, 3, 2_000_001),
        torch.randn(2, 300, 5000)[:, :, 7:4000],
    ):
        for a, b in zip(small.rescale(uploaded(M)), small.rescale(M), strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("name", OPERATIONS)
def test_equal_bits(name: str) -> None:
    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return OPERATIONS[name](DEVICE)

    first = run()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_a_matrix_does_not_depend_on_its_batch() -> None:
    G = batch(20)
    alone = [small.eigh(G[i : i + 1])[1] for i in range(20)]
    assert torch.equal(torch.cat(alone), small.eigh(G)[1])


def test_the_current_stream_is_used() -> None:
    """Work queued on a side stream comes after what was queued there before; nothing waits for the host."""
    G, stream = batch(50), torch.cuda.Stream()
    expected = small.eigh(G)
    torch.cuda.synchronize()
    late = torch.zeros_like(G)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(G)
        results = small.eigh(late)
        assert not stream.query()  # queued, not done
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_no_operation_waits_for_the_device() -> None:
    U, Vh = torch.randn(2, 300, 40, device=DEVICE), torch.randn(2, 40, 200, device=DEVICE)
    G, M, sigma = (
        batch(4),
        torch.randn(2, 300, 500, device=DEVICE),
        torch.rand(3, 50, dtype=F64, device=DEVICE),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        small.cholesky_inverse(G, 1e-9)
        small.eigh(G)
        small.rescale(M)
        small.fix_signs_(U, Vh)
        small.effective_rank(sigma)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", OPERATIONS)
def test_another_device_than_the_current_one(name: str) -> None:
    torch.manual_seed(0)
    expected = OPERATIONS[name](DEVICE)
    torch.manual_seed(0)
    results = OPERATIONS[name](torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    assert all(
        result.device.index == 1 and torch.equal(result.cpu(), e.cpu())
        for result, e in zip(results, expected, strict=True)
    )


def test_a_cuda_graph_replays_them_on_new_values() -> None:
    G, M, sigma = (
        batch(6),
        torch.randn(2, 300, 500, device=DEVICE),
        torch.rand(3, 50, dtype=F64, device=DEVICE),
    )
    U, Vh = torch.randn(2, 300, 40, device=DEVICE), torch.randn(2, 40, 200, device=DEVICE)

    def everything() -> tuple[Tensor, ...]:
        left, right = U.clone(), Vh.clone()
        small.fix_signs_(left, right)
        return (
            *small.cholesky_inverse(G, 1e-9),
            *small.eigh(G),
            *small.rescale(M),
            left,
            right,
            small.effective_rank(sigma),
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for tensor in (M, sigma, U, Vh):
        tensor.copy_(torch.rand_like(tensor) - (0.5 if tensor is not sigma else 0.0))
    G.copy_(batch(6))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, everything(), strict=True))


def test_registered_operators() -> None:
    torch.library.opcheck(torch.ops.mingle.cholesky_inverse.default, (batch(2, 9), 1e-13, torch.float32))
    torch.library.opcheck(torch.ops.mingle.small_eigh.default, (batch(2, 9),))
    torch.library.opcheck(torch.ops.mingle.rescale.default, (torch.randn(2, 5, 3, device=DEVICE).mT,))
    torch.library.opcheck(
        torch.ops.mingle.fix_signs_.default,
        (torch.randn(2, 5, 3, device=DEVICE), torch.randn(2, 3, 4, device=DEVICE)),
    )
    torch.library.opcheck(
        torch.ops.mingle.effective_rank.default, (torch.rand(2, 5, dtype=F64, device=DEVICE),)
    )


def test_wider_matrices_and_no_matrices_go_to_torch() -> None:
    assert not small_kernels.serve(torch.zeros(1, 129, 129, dtype=F64, device=DEVICE), 129)
    _, W, flags = small.eigh(batch(1, 140))
    assert (W.mT @ W - torch.eye(140, device=DEVICE)).abs().max() < 1e-12 and flags.item() == 0
    assert small.eigh(torch.zeros(0, 4, 4, dtype=F64, device=DEVICE))[1].shape == (0, 4, 4)


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="U is on cuda:0, Vh on cpu"):
        small.fix_signs_(torch.zeros(1, 4, 3, device=DEVICE), torch.zeros(1, 3, 4))


SANITIZER = shutil.which("compute-sanitizer")
#: sizes of matrices; the tools that follow every access to memory take minutes for large ones
SIZES = {"memcheck": (1, 2, 7, 8, 33, 128), "synccheck": (1, 2, 7, 8, 33, 128)}
SIZES |= {"racecheck": (1, 2, 7, 8), "initcheck": (1, 2, 7, 8)}
DRIVER = """
import sys
import torch
from mingle.ops import small_factorizations as small
for n in map(int, sys.argv[1:]):
    Y = torch.randn(3, n + 3, n, dtype=torch.float64)
    Y[1, :, n // 2] = Y[1, :, 0]
    Y[2, :, 0] = 0
    G = (Y.mT @ Y).cuda()
    small.cholesky_inverse(G, 1e-12)
    small.cholesky_inverse(G, 1e-12, torch.float32)
    small.eigh(G)
    small.effective_rank(G[:, 0].abs())
    U, Vh = Y.cuda(), torch.randn(3, n, 5, dtype=torch.float64, device="cuda")
    small.fix_signs_(U, Vh)
    small.fix_signs_(U.float(), Vh.mT.contiguous().mT.float())
small.rescale(torch.randn(2, 300, 501, device="cuda"))
small.rescale(torch.randn(2, 30, 51, dtype=torch.float64, device="cuda")[:, :, 3:])
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", SIZES)
def test_compute_sanitizer(tool: str, tmp_path: Path) -> None:
    """Only our kernels are watched; every tensor is an allocation of its own, so that its ends are known."""
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [
        str(SANITIZER),
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-regex",
        "kns=mingle",
        sys.executable,
        str(tmp_path / "driver.py"),
        *map(str, SIZES[tool]),
    ]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=150)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
