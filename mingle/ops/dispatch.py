"""Which backend computes a gated sum of experts, and in which form: the one place that decides."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from mingle.kernels import chips

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "grouped", "triton")

# found here, as torch.compile could not follow the search
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Of the vendor library's rate: what its own products reach beside other work, and the fused kernels by the
# size of a number, as measured (bench/results).
_LIBRARY_SHARE = 0.8
_TRITON_SHARE = {2: 0.8, 4: 0.2}
_RATE = {2: 1.0, 4: 1 / 15}  # of products of fp32 relative to bf16
# Multiplications in the time of a number's way to memory and back.  On CPUs operations alone decide: results
# of version 0.1.0 keep their bits.
_TOUCHED = {"cuda": 1300}
_START = 3e-6  # seconds of a kernel beyond its arithmetic or its bytes
_HOST = {"grouped": 150e-6, "triton": 120e-6}  # seconds of the processor that launches the kernels


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


class ExecutionPlan(NamedTuple):
    """How one call is computed."""

    backend: str  # "grouped", "triton", or "auto" where the operator takes the `cheapest`
    fold: bool  # whether the experts are folded into one weight first


def plan(backend: str, x: torch.Tensor, group: int, d_out: int, columns: int) -> ExecutionPlan:
    """How a layer of d_out outputs and T·r = `columns` computes x [N, d_in], `group` tokens to a gate row.

    Raises:
        BackendUnavailable: an explicit backend cannot run.
    """
    if backend == "auto":
        backend, traced = "grouped", torch.compiler.is_compiling()  # a tracer follows neither caches nor logs
        if x.device.type == "cuda":
            reason = without_triton(x.device, x.dtype)
            backend = "auto" if reason is None else "grouped"
            if not traced:
                _tell("cuda", reason)
        elif not traced:
            _tell_elsewhere(x.device.type, x.dtype)
    elif backend == "triton" and (reason := without_triton(x.device, x.dtype)):
        raise BackendUnavailable(f"backend='triton' cannot run: {reason}")
    fold = group == x.shape[0] and folding_pays(x.shape[0], x.shape[1], d_out, columns, x.device.type)
    return ExecutionPlan(backend, fold)


def folding_pays(tokens: int, d_in: int, d_out: int, columns: int, device: str) -> bool:
    """Whether folding costs less for this many tokens that share their gates.

    In multiplications: low-rank n [d_in·d_out + R (d_in + d_out)] with R = `columns`; folded
    d_in·d_out (R + n), and what a number of the folded weight costs that is read, written and read again.
    """
    weight = d_in * d_out
    return columns * (tokens * (d_in + d_out) - weight) > _TOUCHED.get(device, 0) * weight


def without_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve tensors of this device and dtype; None where they can."""
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes bfloat16 products wrongly" if dtype == torch.bfloat16 else None
    return f"the tensors are on {device.type}, the kernels run on CUDA and ROCm devices"


def explanation(device: torch.device) -> str:
    """Whether the Triton kernels serve fp32 tensors on `device`, and by which figures, in words."""
    if reason := without_triton(device, torch.float32):
        return f"not used: {reason}"
    chip = chips.chip(device)
    table = f"the table of {'gfx' if chip.kind == 'hip' else 'sm_'}{chip.capability}"
    if chips.family(chip).measured:
        return f"used where {table}, measured on such a chip, holds it for faster"
    return f"not used by backend='auto': {table} was not measured; backend='triton' uses it"


@cache
def _tell(device: str, reason: str | None) -> None:
    """Say once what keeps `auto` from the fused kernels; aloud where a GPU waits for them."""
    if reason is not None:
        level = logging.WARNING if device == "cuda" and not _TRITON_INSTALLED else logging.INFO
        logger.log(level, "backend='auto' computes with dense products instead of the kernels: %s", reason)


@cache
def _tell_elsewhere(device: str, dtype: torch.dtype) -> None:
    """`_tell` for devices that the kernels never serve by themselves; there, small layers wait for Python."""
    _tell(device, without_triton(torch.device(device), dtype))


def cheapest(x: torch.Tensor, outputs: int, columns: int) -> str:
    """The backend for x [N, d_in] that `seconds` holds for the fastest.

    It is for operators, as a tracer could not ask for the device.  On chips that nobody has measured it is
    ``"grouped"``, the vendor's library.
    """
    if without_triton(x.device, x.dtype) is not None:
        return "grouped"
    return _faster(chips.chip(x.device), x.shape[0], x.shape[1], outputs, columns, x.element_size())


@lru_cache(4096)
def _faster(chip: chips.Chip, tokens: int, d_in: int, d_out: int, columns: int, itemsize: int) -> str:
    speed = chips.family(chip)
    if not speed.measured:
        return "grouped"
    sizes = tokens, d_in, d_out, columns, itemsize
    costs = {backend: seconds(backend, *sizes, speed) for backend in ("grouped", "triton")}
    return min(costs, key=costs.__getitem__)


def seconds(
    backend: str, tokens: int, d_in: int, d_out: int, columns: int, itemsize: int, speed: chips.Family
) -> float:
    """The modelled time of one forward on an H100: each kernel's arithmetic or bytes, and its start.

    Without a CUDA graph small layers wait for the host.
    """
    share = _TRITON_SHARE[itemsize] if backend == "triton" else _LIBRARY_SHARE
    rate = share * speed.matrix * speed.multiprocessors * _RATE[itemsize]

    def product(rows: int, inner: int, outer: int) -> float:
        touched = (rows * inner + inner * outer + rows * outer) * itemsize
        return max(2 * rows * inner * outer / rate, touched / speed.bandwidth) + _START

    def passing(numbers: int) -> float:
        return numbers * itemsize / speed.bandwidth + _START

    gates = passing(tokens * d_in) + _START
    if backend == "triton":
        time = gates + product(tokens, d_in, columns) + product(tokens, d_in + columns, d_out)
        return max(time, _HOST[backend])
    # three products, the last of which reads y again, and the gates' product with H in place
    products = product(tokens, d_in, columns) + product(tokens, d_in, d_out) + product(tokens, columns, d_out)
    time = gates + products + passing(2 * tokens * columns) + tokens * d_out * itemsize / speed.bandwidth
    return max(time, _HOST[backend])
