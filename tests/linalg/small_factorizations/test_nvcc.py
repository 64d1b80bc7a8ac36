"""csrc compiled by nvcc for every target, without a GPU: spills, registers and shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from host_build import CSRC

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
pytestmark = [pytest.mark.skipif(NVCC is None, reason="no nvcc"), pytest.mark.slow]

# Bytes of shared memory that a block may ask for, and registers of a multiprocessor.
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}
REGISTERS = 65_536
# Threads and bytes of dynamic shared memory of the largest launches, by kernel.
LAUNCHES = {
    "cholesky_inverse_kernel": (256, 8 * (128 * 129 // 2 + 2 * 128 + 8 * 128 + 8 * 8)),
    "small_eigh_kernel": (1024, 0),  # see `dynamic`
    "survey_kernel": (256, 0),
    "rescale_kernel": (256, 0),
    "fix_signs_kernel": (256, 0),
    "effective_rank_kernel": (256, 0),
}


def dynamic(kernel: Kernel) -> int:
    """Bytes of dynamic shared memory of its largest launch, for `small_eigh` on the widest that fits."""
    if kernel.name != "small_eigh_kernel":
        return LAUNCHES[kernel.name][1]
    sizes = (8 * (n * (n | 1) + 2 * n + (n + 1) // 2) for n in range(128, 0, -1))
    return next(size for size in sizes if kernel.shared + size <= SHARED[kernel.target])


class Kernel(NamedTuple):
    """What ptxas says of one kernel on one target."""

    name: str
    target: str
    spilled: int
    registers: int
    shared: int  # static


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    folder: Path = tmp_path_factory.mktemp("nvcc")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90, 100, 120)]
    options = ["-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "2", "-Werror", "all-warnings"]
    done = subprocess.run(
        [str(NVCC), *options, *targets, "-c", str(CSRC / "rsvd.cu"), "-o", str(folder / "rsvd.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = re.compile(
        rf"Compiling entry function '\w*?({'|'.join(LAUNCHES)})\w*' for '(sm_\d+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)\n",
        re.DOTALL,
    )
    found = []
    for name, target, stores, loads, registers, rest in report.findall(done.stderr):
        static = re.search(r"(\d+) bytes smem", rest)
        found.append(
            Kernel(name, target, int(stores) + int(loads), int(registers), int(static[1]) if static else 0)
        )
    return found


def test_every_kernel_is_built_for_every_target(kernels: list[Kernel]) -> None:
    two_types = ("cholesky_inverse_kernel", "survey_kernel", "rescale_kernel", "fix_signs_kernel")
    instances = dict.fromkeys(two_types, 2)
    for target in SHARED:
        names = sorted(kernel.name for kernel in kernels if kernel.target == target)
        assert names == sorted(name for name in LAUNCHES for _ in range(instances.get(name, 1)))


def test_nothing_is_spilled_and_a_block_fits(kernels: list[Kernel]) -> None:
    assert kernels
    for kernel in kernels:
        threads, _ = LAUNCHES[kernel.name]
        assert kernel.spilled <= (64 if kernel.target == "sm_120" else 0), kernel
        assert kernel.registers * threads <= REGISTERS, kernel
        assert kernel.shared + dynamic(kernel) <= SHARED[kernel.target], kernel
        if kernel.name == "small_eigh_kernel":  # 128 columns, or the 111 of a card with 99 KB
            assert dynamic(kernel) > (130_000 if SHARED[kernel.target] > 150_000 else 98_000), kernel


def test_two_factorisations_share_a_multiprocessor(kernels: list[Kernel]) -> None:
    """The reason why the triangle is packed."""
    threads, memory = LAUNCHES["cholesky_inverse_kernel"]
    for kernel in kernels:
        if kernel.name == "cholesky_inverse_kernel" and SHARED[kernel.target] > 150_000:
            assert (
                2 * kernel.registers * threads <= REGISTERS and 2 * (kernel.shared + memory + 1024) <= 167_936
            )
