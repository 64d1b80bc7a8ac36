"""The choice of a library for products, as a new process finds it."""

from __future__ import annotations

from mingle.kernels import gemm


def forget() -> None:
    for cached in (gemm._store, gemm._chosen, gemm._onednn_agrees):
        cached.cache_clear()
