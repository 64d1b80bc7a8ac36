"""Dense products in the faster of the CPU's two libraries.

PyTorch sends fp32 linear layers on the CPU to MKL, which on some processors reaches half of what oneDNN does.
oneDNN's linear operator is in PyTorch but not among its public functions, so it is used only where it exists,
agrees with `torch.nn.functional.linear` and is faster.  That is measured once for a machine and kept in the
user's cache folder: the two libraries round differently, and equal inputs should give equal bits next time as
well.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mingle.kernels.store import Store

logger = logging.getLogger(__name__)

LIBRARIES = ("mkl", "onednn")
MARGIN = 1.02  # how much faster oneDNN must be to be chosen
_AGREEING = 1.05  # how much rounds that agree differ at most
CHANGE = 1.1  # how much a choice must be found to cost to be changed, so that it is the same tomorrow
_ROUNDS = 9  # of measurements that are kept
_SAMPLE = (256, 512), (512, 512)  # of x and of the weight that are measured
_SMALLEST = 1 << 20  # multiplications below which a product is over before the choice could matter


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ + b, or x Wᵀ + onto, which may be overwritten.  Not differentiable on its own.

    x [N, K], weight [O, K] of any strides, bias [O], onto [N, O] → [N, O].
    """
    assert bias is None or onto is None
    if _onednn_pays(x, weight, bias):
        return _onednn(x, weight, bias, onto)
    return F.linear(x, weight, bias) if onto is None else onto.addmm_(x, weight.mT)


def _onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, onto: torch.Tensor | None = None
) -> torch.Tensor:
    bias = None if bias is None else bias.contiguous()  # it reads a strided one wrongly
    if onto is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, onto, weight, bias, "add")


def _onednn_pays(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    shape = x.shape[0], *weight.shape
    if not (choosing(math.prod(shape)) and _onednn_serves(x, weight)):
        return False
    # in bf16 PyTorch goes to oneDNN by itself, but copies b to every row first
    return library(*shape) == "onednn" if x.dtype == torch.float32 else bias is not None


def _onednn_serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """oneDNN is asked for fp32 and bf16 CPU matrices without gaps.

    A weight that is part of a wider matrix would go to its reference code, a thousand times slower.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and 1 in x.stride()
        and (weight.is_contiguous() or weight.mT.is_contiguous())
        and _onednn_agrees(x.dtype)
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
def _onednn_agrees(dtype: torch.dtype) -> bool:
    """Whether the operator exists here and computes what it should; asked once."""
    x, weight = torch.arange(-6.0, 6.0, dtype=dtype).view(3, 4), torch.arange(20.0, dtype=dtype).view(5, 4)
    bias, onto = torch.ones(5, dtype=dtype), torch.ones(3, 5, dtype=dtype)
    expected, rounding = F.linear(x.float(), weight.float(), bias.float()), torch.finfo(dtype).eps
    try:
        results = (
            _onednn(x, weight, bias),
            _onednn(x, weight.mT.contiguous().mT, bias),
            _onednn(x, weight, bias, onto) - onto,
        )
        return all(
            result.dtype == dtype and torch.allclose(result.float(), expected, rtol=rounding)
            for result in results
        )
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
    return _chosen(torch.get_num_threads()).library if choosing(rows * outputs * width) else "mkl"


def explanation() -> str:
    """Which library multiplies large fp32 matrices here, and why, in words."""
    if forced := os.environ.get("MINGLE_CPU_GEMM"):
        return f"{library(1, 1, 1)}: MINGLE_CPU_GEMM={forced}"
    if not _onednn_agrees(torch.float32):
        return "mkl: this PyTorch has no operator of oneDNN that gives the same"
    choice = _chosen(torch.get_num_threads())
    return f"{choice.library}: oneDNN {choice.ratio:.2f} times as fast, median of {len(choice.ratios)} rounds"


def choosing(multiplications: int) -> bool:
    """Whether there is anything to choose: small products go to MKL unless ``$MINGLE_CPU_GEMM`` is set."""
    return multiplications >= _SMALLEST or bool(os.environ.get("MINGLE_CPU_GEMM"))


class Choice(NamedTuple):
    """What was measured of a machine.  `ratios`: MKL's time over oneDNN's, round by round."""

    library: str
    ratios: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@cache
def _store() -> Store:
    return Store("cpu-gemm.json")


@cache
def _chosen(threads: int) -> Choice:
    """The choice of this machine: measured once, and followed up by later processes.

    The first one measures rounds until two in a row agree.  Each later one adds a round, until there are
    enough; the choice changes only where they show that it costs a tenth or more.
    """
    key = f"{platform.node()}, {threads} threads, torch {torch.__version__}"
    known = _known(_store().get(key))
    if known is not None and len(known.ratios) >= _ROUNDS:
        return known
    ratios = [_ratio()] if known is None else [*known.ratios, _ratio()]
    while known is None and len(ratios) < _ROUNDS and not _agree(ratios):
        ratios.append(_ratio())
    if known is None and (meanwhile := _known(_store().stored_meanwhile(key))) is not None:
        return meanwhile  # processes that start together are to have the same bits
    least = MARGIN * {None: 1.0, "onednn": 1 / CHANGE, "mkl": CHANGE}[known and known.library]
    choice = Choice("onednn" if statistics.median(ratios) > least else "mkl", ratios)
    _store().put(key, choice._asdict())
    return choice


def _known(stored: Any) -> Choice | None:
    """A stored choice; None where what is stored means nothing."""
    try:
        choice = Choice(**stored)
        valid = choice.library in LIBRARIES and all(isinstance(r, float) and r > 0 for r in choice.ratios)
    except TypeError:
        return None
    return choice if valid and choice.ratios else None


def _agree(ratios: list[float]) -> bool:
    """Whether the last two rounds differ by no more than a twentieth."""
    return len(ratios) > 1 and max(ratios[-2:]) <= _AGREEING * min(ratios[-2:])


def _ratio() -> float:
    """Time of MKL over time of oneDNN, the median of a few products in turns: milliseconds in all."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in _SAMPLE)

    def seconds(call: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    calls = (lambda: F.linear(x, weight), lambda: _onednn(x, weight, None))
    with torch.no_grad():
        rounds = [[seconds(call) for call in calls] for _ in range(6)][1:]
    return statistics.median(mkl / onednn for mkl, onednn in rounds)
