"""Which backend computes a gated sum of experts, and in which form: the one place that decides."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "grouped", "triton")

# The cost model of `auto` on a GPU, in H100 figures: only their ratios matter.
_PEAK = 798e12  # FLOP/s of a large bf16 product in the vendor's library
_BANDWIDTH = 3.0e12  # bytes/s of a large copy, read and write
_LAUNCH = 3e-6  # seconds between launches of small kernels
_TRITON_SHARE = 0.75  # of the vendor library's rate that the fused kernels reach on large products


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


class ExecutionPlan(NamedTuple):
    """How one call is computed."""

    backend: str  # "grouped" or "triton"
    fold: bool  # whether the experts are folded into one weight first


def plan(backend: str, x: torch.Tensor, group: int, d_out: int, columns: int) -> ExecutionPlan:
    """How a layer of d_out outputs and T·r = `columns` computes x [N, d_in], `group` tokens to a gate row.

    Raises:
        BackendUnavailable: an explicit backend cannot run.
    """
    if backend == "auto":
        backend = _cheapest(x, d_out, columns)
    elif backend == "triton" and (reason := without_triton(x.device, x.dtype)):
        raise BackendUnavailable(f"backend='triton' cannot run: {reason}")
    return ExecutionPlan(backend, group == x.shape[0] and folding_pays(x.shape[0], x.shape[1], d_out))


def folding_pays(tokens: int, d_in: int, d_out: int) -> bool:
    """Whether folding costs fewer operations for this many tokens that share their gates.

    Low-rank: 2n [d_in·d_out + R (d_in + d_out)]; folded: 2 d_in·d_out (R + n).  The sum R of all ranks drops
    out.
    """
    return tokens * (d_in + d_out) > d_in * d_out


def without_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve tensors of this device and dtype; None where they can."""
    if not _triton_installed():
        return "the package triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes bfloat16 products wrongly" if dtype == torch.bfloat16 else None
    return f"the tensors are on {device.type}, the kernels run on CUDA and ROCm devices"


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _tell(device: str, reason: str | None) -> None:
    """Say once what keeps `auto` from the fused kernels; aloud where a GPU waits for them."""
    if reason is not None:
        level = logging.WARNING if device == "cuda" and not _triton_installed() else logging.INFO
        logger.log(level, "backend='auto' computes with dense products instead of the kernels: %s", reason)


def _cheapest(x: torch.Tensor, d_out: int, columns: int) -> str:
    if x.device.type != "cuda" or without_triton(x.device, x.dtype) is not None:
        if not torch.compiler.is_compiling():  # a tracer follows neither caches nor logs
            _tell(x.device.type, without_triton(x.device, x.dtype))
        return "grouped"
    costs = {
        backend: seconds(backend, x.shape[0], x.shape[1], d_out, columns, x.element_size())
        for backend in ("grouped", "triton")
    }
    return min(costs, key=costs.__getitem__)


def seconds(backend: str, tokens: int, d_in: int, d_out: int, columns: int, itemsize: int) -> float:
    """The modelled time of one forward on a GPU.

    Every kernel takes as long as its arithmetic, its bytes or a launch, whichever is longest.
    """
    rate = _PEAK * 2 / itemsize * (_TRITON_SHARE if backend == "triton" else 1.0)

    def product(rows: int, inner: int, outer: int, extra: int = 0) -> float:
        touched = rows * inner + inner * outer + rows * outer + extra
        return max(2 * rows * inner * outer / rate, touched * itemsize / _BANDWIDTH, _LAUNCH)

    if backend == "triton":
        shrink = product(tokens, d_in, columns)
        return shrink + product(tokens, d_in + columns, d_out)
    gate = max(2 * tokens * columns * itemsize / _BANDWIDTH, _LAUNCH)
    pooling = max(tokens * d_in * itemsize / _BANDWIDTH, _LAUNCH) + _LAUNCH
    return (
        product(tokens, d_in, columns)
        + pooling
        + gate
        + product(tokens, d_in, d_out)
        + product(tokens, columns, d_out, tokens * d_out)
    )
