"""Dense products in the faster of the CPU's two libraries.

PyTorch sends fp32 linear layers on the CPU to MKL, which on some processors reaches half of what oneDNN does.
oneDNN's linear operator is in PyTorch but not among its public functions, so it is used only where it exists,
agrees with `torch.nn.functional.linear` and was at least a fifth faster when it was timed once, for this
machine and class of shapes.  The choice is kept in the user's cache folder: the two libraries round
differently, and equal inputs should give equal bits next time as well.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from mingle.kernels.store import Store

logger = logging.getLogger(__name__)

LIBRARIES = ("mkl", "onednn")
MARGIN = 1.2  # how much faster oneDNN must be; well above the noise, so that the choice is the same tomorrow
_LARGEST = 1024  # dimensions beyond it behave alike
_SMALLEST = 1 << 20  # multiplications below which a product is over before the choice could matter


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ + b, or x Wᵀ + onto, which may be overwritten.  Not differentiable on its own.

    x [N, K], weight [O, K] of any strides, bias [O], onto [N, O] → [N, O].
    """
    assert bias is None or onto is None
    shape = x.shape[0], *weight.shape
    if _open(*shape) and _onednn_serves(x, weight) and library(*shape) == "onednn":
        return _onednn(x, weight, bias, onto)
    return F.linear(x, weight, bias) if onto is None else onto.addmm_(x, weight.mT)


def _onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, onto: torch.Tensor | None = None
) -> torch.Tensor:
    bias = None if bias is None else bias.contiguous()  # it reads a strided one wrongly
    if onto is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, onto, weight, bias, "add")


def _onednn_serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """oneDNN is asked for fp32 CPU matrices without gaps; PyTorch takes it for bf16 and fp16 by itself.

    A weight that is part of a wider matrix would go to its reference code, a thousand times slower.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and 1 in x.stride()
        and (weight.is_contiguous() or weight.mT.is_contiguous())
        and _onednn_agrees()
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """W [O, K] in oneDNN's own layout, for `linear_packed` alone: PyTorch cannot look into it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def linear_packed(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b for a `pack` of W; only where `packing_pays`."""
    return _onednn(x if 1 in x.stride() else x.contiguous(), packed, bias)


def packing_pays(x: torch.Tensor, outputs: int) -> bool:
    """Whether a product of x [N, K] with a packed weight [outputs, K] is possible, and the fastest."""
    if x.device.type != "cpu" or x.numel() == 0 or not _packed_agrees(x.dtype):
        return False
    return x.dtype != torch.float32 or library(x.shape[0], outputs, x.shape[1]) == "onednn"


@cache
def _packed_agrees(dtype: torch.dtype) -> bool:
    """Whether this PyTorch packs weights of `dtype` and multiplies them as it should; asked once."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    x, weight, bias = (torch.linspace(-1, 1, n).to(dtype) for n in (12, 20, 5))
    x, weight = x.view(3, 4), weight.view(5, 4)
    expected = F.linear(x.float(), weight.float(), bias.float())
    try:
        return torch.allclose(linear_packed(x, pack(weight), bias).float(), expected, atol=0.02)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        logger.debug("oneDNN's packed weights are not used for %s: %s", dtype, error)
        return False


@cache
def _onednn_agrees() -> bool:
    """Whether the operator exists here and computes what it should; asked once."""
    x, weight = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 2, 20).view(5, 4)
    bias, onto = torch.ones(5), torch.ones(3, 5)
    expected = F.linear(x, weight, bias)
    try:
        results = (
            _onednn(x, weight, bias),
            _onednn(x, weight.mT.contiguous().mT, bias),
            _onednn(x, weight, bias, onto) - onto,
        )
        return all(torch.allclose(result, expected, atol=1e-5) for result in results)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        logger.debug("oneDNN's linear operator is not used: %s", error)
        return False


def library(rows: int, outputs: int, width: int) -> str:
    """``"mkl"`` or ``"onednn"`` for a product [rows, width] × [width, outputs].

    ``$MINGLE_CPU_GEMM`` overrules what was measured.
    """
    forced = os.environ.get("MINGLE_CPU_GEMM")
    if forced:
        if forced not in LIBRARIES:
            raise ValueError(f"MINGLE_CPU_GEMM={forced!r}: expected one of {', '.join(LIBRARIES)}")
        return forced
    if not _open(rows, outputs, width):
        return "mkl"
    return _measured(_rounded(rows), _rounded(outputs), _rounded(width), torch.get_num_threads())


def _open(rows: int, outputs: int, width: int) -> bool:
    """Whether there is anything to choose: small products go to MKL unless ``$MINGLE_CPU_GEMM`` is set."""
    return rows * outputs * width >= _SMALLEST or bool(os.environ.get("MINGLE_CPU_GEMM"))


def _rounded(size: int) -> int:
    """The next power of two, at most `_LARGEST`: shapes of one class share a choice."""
    return min(_LARGEST, 1 << (size - 1).bit_length())


@cache
def _store() -> Store:
    return Store("cpu-gemm.json")


@cache
def _measured(rows: int, outputs: int, width: int, threads: int) -> str:
    key = f"{platform.node()}, {threads} threads, torch {torch.__version__}: {rows}x{outputs}x{width}"
    known = _store().get(key)
    if known not in LIBRARIES:
        known = "onednn" if _ratio(rows, outputs, width) > MARGIN else "mkl"
        _store().put(key, known)
    return known


def _ratio(rows: int, outputs: int, width: int) -> float:
    """Time of MKL over time of oneDNN on random matrices, the median of a few interleaved rounds."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, width, generator=generator) for n in (rows, outputs))

    def seconds(call: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    calls = (lambda: F.linear(x, weight), lambda: _onednn(x, weight, None))
    with torch.no_grad():
        rounds = [[seconds(call) for call in calls] for _ in range(8)][1:]
    return statistics.median(mkl / onednn for mkl, onednn in rounds)
