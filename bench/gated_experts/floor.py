"""What the hardware allows: operations and bytes of a case, two measured ceilings, and the time below which nothing can run.

With N tokens, T experts of rank r, R = T·r and G gate vectors (one per token, sample or batch), operations (multiply-adds count
two):

    low-rank forward   2N (d_in d_out + R (d_in + d_out)) + 2GT d_in
    folded forward     2 d_in d_out (GR + N) + 2GT d_in
    low-rank backward  the same products with u = dy B_catᵀ for H, then 2NR for dz and 2G d_in for the newest gate
    folded backward    2N d_in d_out for x, and for dz the cheaper of dyᵀx or the low-rank u and H

Bytes: two launches, shrink and expand, and again two for the backward pass; each reads each of its inputs once and writes each of
its outputs once, gate values in fp32.  A hand-made chain of three GEMMs also carries H and y through memory between its products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mingle.bench.gated_experts.cases import KernelCase

_GATE_BYTES = 4


@dataclass(frozen=True)
class Count:
    """Operations of the cheaper algorithm, its name, those of the base layer alone, and bytes."""

    flop: float
    algorithm: str
    base_flop: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to do: operations per second by dtype, and bytes per second of a copy, read and written."""

    flop_per_second: dict[str, float]
    bytes_per_second: float


class _Work:
    """Numbers of entries, operations and bytes; a token uses `active` experts, and `stored` ones are read at all."""

    def __init__(self, case: KernelCase) -> None:
        active = 1 if case.routed else case.experts
        stored = min(case.experts, case.samples) if case.routed else case.experts
        n, G, self.d_in, self.d_out, self.routed = case.rows, case.groups, case.d_in, case.d_out, case.routed
        self.R, self.stored_R, self.base = active * case.rank, stored * case.rank, case.d_in * case.d_out
        self.n, self.x, self.y, self.hidden = n, n * case.d_in, n * case.d_out, n * self.R
        self.weights, self.folding = G * self.base, 2.0 * self.base * (G * self.R + n)
        self.products = 2.0 * n * (self.base + self.R * (case.d_in + case.d_out))
        gate = 0 if case.routed else case.experts * case.d_in
        self.gate, self.gate_flop, self.newest = gate, 2.0 * G * gate, 0 if case.routed else G * case.d_in
        self.item, self.gate_bytes = case.torch_dtype.itemsize, G * case.experts * _GATE_BYTES


def count(case: KernelCase) -> Count:
    """Of the forward pass, or of forward and backward together."""
    low_rank, folded = forward_flop(case), folded_forward_flop(case)
    moved, base = forward_bytes(case), 2.0 * case.rows * case.d_in * case.d_out
    if case.backward:
        low_rank, folded = low_rank + backward_flop(case), folded + folded_backward_flop(case)
        moved, base = moved + backward_bytes(case), 2 * base
    if folded < low_rank:
        return Count(folded, "folded", base, folded_bytes(case))
    return Count(low_rank, "low-rank", base, moved)


def forward_flop(case: KernelCase) -> float:
    w = _Work(case)
    return w.products + w.gate_flop


def folded_forward_flop(case: KernelCase) -> float:
    w = _Work(case)
    return w.folding + w.gate_flop


def backward_flop(case: KernelCase) -> float:
    """Of the gradients of x and the newest gate, everything else being frozen."""
    w = _Work(case)
    return w.products + (0 if w.routed else 2 * w.hidden) + w.gate_flop + 2 * w.newest


def folded_backward_flop(case: KernelCase) -> float:
    w = _Work(case)
    dz = 0 if w.routed else min(w.folding, 2.0 * w.hidden * (w.d_in + w.d_out))
    return 2.0 * w.n * w.base + dz + w.gate_flop + 2 * w.newest


def forward_bytes(case: KernelCase) -> float:
    """Of two launches: x and the shrinking half in, H and z out; x, H, z, base and the expanding half in, y out."""
    w = _Work(case)
    shrink = w.x + w.stored_R * w.d_in + w.gate + w.hidden
    expand = w.x + w.hidden + w.base + w.stored_R * w.d_out + w.y
    return (shrink + expand) * w.item + 2 * w.gate_bytes


def chain_bytes(case: KernelCase) -> float:
    """Of the forward pass as three GEMMs: H is gated in place, and y is read again by the last product."""
    w = _Work(case)
    return forward_bytes(case) + 2 * (w.hidden + w.y) * w.item


def backward_bytes(case: KernelCase) -> float:
    """Of two launches: dy, B and the saved H in, u and dz out; dy, u, base, A, the gates and z, dz in, dx out; x for
    the newest gate.
    """
    w = _Work(case)
    upstream = w.y + w.stored_R * w.d_out + 2 * w.hidden
    expand = w.y + w.hidden + w.base + w.stored_R * w.d_in + w.x
    return (upstream + expand + w.gate + w.newest) * w.item + (2 if w.routed else 3) * w.gate_bytes


def folded_bytes(case: KernelCase) -> float:
    """W₀, A and B in, W_eff out once per gate vector; then x and W_eff in, y out; the gates read x before.  Backward
    likewise with dy.
    """
    w = _Work(case)
    fold = w.base + w.stored_R * (w.d_in + w.d_out) + w.weights
    forward = fold + w.weights + w.x + w.y + (0 if w.routed else w.x + w.gate)
    backward = w.weights + w.x + w.y + w.x + (0 if w.routed else w.gate + w.y)
    return (forward + backward * case.backward) * w.item


def ceilings(
    dtypes: Iterable[str], device: torch.device, gemm_size: int | None = None, copy_bytes: int | None = None
) -> Ceilings:
    """Measured now: the fastest of several large products per dtype, and of several large copies."""
    cuda = device.type == "cuda"
    size, rates = gemm_size or (8192 if cuda else 1536), {}
    for dtype in sorted(set(dtypes)):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        rates[dtype] = 2.0 * size**3 / min(fastest(product, device) for product in products(a, b))
    source = torch.zeros(copy_bytes or (2**30 if cuda else 2**27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(rates, 2.0 * source.numel() / fastest(lambda: target.copy_(source), device))


def floor(case: KernelCase, limits: Ceilings) -> tuple[float, str]:
    """Seconds that the case takes at least, and which ceiling says so."""
    needed = count(case)
    arithmetic = needed.flop / limits.flop_per_second[case.dtype]
    memory = needed.bytes / limits.bytes_per_second
    return max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory"


def products(x: Tensor, weight: Tensor) -> list[Callable[[], Tensor]]:
    """x weightᵀ in every library that PyTorch has for it here: `F.linear`, and on CPUs oneDNN through an operator that is not
    public.
    """
    found: list[Callable[[], Tensor]] = [lambda: F.linear(x, weight)]
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        try:
            operator = torch.ops.mkldnn._linear_pointwise
            own, theirs = F.linear(x[:2], weight), operator(x[:2], weight, None, "none", [], "")
            if torch.allclose(theirs.float(), own.float(), rtol=0.1, atol=0.1):
                found.append(lambda: operator(x, weight, None, "none", [], ""))
        except (AttributeError, RuntimeError):
            pass
    return found


def fastest(run: Callable[[], object], device: torch.device, repetitions: int = 6) -> float:
    """Seconds of the shortest of several calls."""
    seconds = []
    for _ in range(repetitions):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
