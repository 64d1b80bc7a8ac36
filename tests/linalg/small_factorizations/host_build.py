"""Builds csrc with g++ for one thread of the host, and calls it with torch tensors as
`mingle.ops.small_factorizations` is called.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).parents[3] / "csrc"
COMPILER = shutil.which("g++")
MISSING = None if COMPILER else "no g++"

_SUFFIX = {torch.float64: "f64", torch.float32: "f32"}


def compile_program(sources: Sequence[Path], output: Path, *options: str) -> Path:
    """`output`, compiled from `sources`; headers of csrc come last, after those next to the sources."""
    assert COMPILER is not None
    command = [
        COMPILER,
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        *options,
        "-I",
        str(CSRC),
        *map(str, sources),
        "-o",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


class Host:
    """The algorithms of csrc, compiled for the host: `small_factorizations` for CPU tensors."""

    def __init__(self, source: Path, library: Path, *options: str) -> None:
        self._library = ctypes.CDLL(str(compile_program([source], library, "-shared", "-fPIC", *options)))

    def cholesky_inverse(
        self, gram: Tensor, shift: float, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor]:
        gram, (batch, n, _) = gram.contiguous(), gram.shape
        inverse, flags = _poisoned(gram.shape, dtype), _poisoned([batch], torch.int32)
        self._call(
            f"cholesky_inverse_{_SUFFIX[dtype]}",
            gram,
            batch,
            ctypes.c_int(n),
            ctypes.c_double(shift),
            inverse,
            flags,
        )
        return inverse, flags

    def eigh(self, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gram, (batch, n, _) = gram.contiguous(), gram.shape
        values, vectors, flags = (
            _poisoned([batch, n], gram.dtype),
            _poisoned(gram.shape, gram.dtype),
            _poisoned([batch], torch.int32),
        )
        self._call("small_eigh", gram, batch, ctypes.c_int(n), values, vectors, flags)
        return values, vectors, flags

    def rescale(self, M: Tensor, chunks: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, m, n = M.shape
        assert M.stride(2) == 1
        chunks = chunks or self._library.rescale_chunks(ctypes.c_int64(m * n))
        scaled, exponent = _poisoned(M.shape, torch.float32), _poisoned([batch], torch.int32)
        count, first = _poisoned([batch], torch.int64), _poisoned([batch], torch.int64)
        sizes = (batch, m, n, M.stride(0), M.stride(1), ctypes.c_int(chunks))
        self._call(f"rescale_{_SUFFIX[M.dtype]}", M, *sizes, scaled, exponent, count, first)
        return scaled, exponent, count, first

    def fix_signs_(self, U: Tensor, Vh: Tensor) -> None:
        strides = [torch.tensor(tensor.stride()) for tensor in (U, Vh)]
        self._call(f"fix_signs_{_SUFFIX[U.dtype]}", U, strides[0], Vh, strides[1], *U.shape, Vh.shape[2])

    def effective_rank(self, sigma: Tensor) -> Tensor:
        sigma, ranks = sigma.contiguous(), _poisoned([len(sigma)], torch.int32)
        self._call("effective_rank", sigma, len(sigma), ctypes.c_int(sigma.shape[1]), ranks)
        return ranks

    def widest_eigh(self, bytes_of_a_block: int) -> int:
        return int(self._library.widest_eigh(ctypes.c_int64(bytes_of_a_block)))

    def _call(self, name: str, *arguments: object) -> None:
        def convert(argument: object) -> object:
            if isinstance(argument, Tensor):
                return ctypes.c_void_p(argument.data_ptr())
            return ctypes.c_int64(argument) if isinstance(argument, int) else argument

        getattr(self._library, name)(*map(convert, arguments))


def _poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What nobody writes is seen."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else -77, dtype=dtype)
