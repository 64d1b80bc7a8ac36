"""What the hardware allows: operations and bytes of a case, two measured ceilings, and the time they imply.

With N tokens, T experts of rank r, R = T·r and G gate vectors (one per token, sample or batch), operations,
of which a multiply-add counts two:

    low-rank forward   2N (d_in d_out + R (d_in + d_out)) + 2GT d_in
    folded forward     2 d_in d_out (GR + N) + 2GT d_in
    low-rank backward  the same products with u = dy B_catᵀ for H, 2NR for dz and 2G d_in for the newest gate
    folded backward    2N d_in d_out for x, and for dz the cheaper of dyᵀx or the low-rank u and H

Bytes: two launches, shrink and expand, and again two for the backward pass; each reads each of its inputs
once and writes each of its outputs once, gate values in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mingle.bench.gated_experts.cases import KernelCase
from mingle.bench.measure import timed

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
    """Measured operations per second by dtype, and bytes per second of a copy, read and written."""

    flop_per_second: dict[str, float]
    bytes_per_second: float


class Work:
    """Operations and bytes of a case; a token uses `active` experts, and `stored` ones are read at all."""

    def __init__(self, case: KernelCase) -> None:
        active = 1 if case.routed else case.experts
        stored = min(case.experts, case.samples) if case.routed else case.experts
        N, G, R, d_in, d_out = case.rows, case.groups, active * case.rank, case.d_in, case.d_out
        base, x, y, hidden, weights = d_in * d_out, N * d_in, N * d_out, N * R, G * d_in * d_out
        A, B = stored * case.rank * d_in, stored * case.rank * d_out
        # in fp32 and in the case's dtype; where a router gives the gates, there are none to compute
        values, linear = G * case.experts * _GATE_BYTES, not case.routed
        gate, newest, item = linear * case.experts * d_in, linear * G * d_in, case.torch_dtype.itemsize

        products, folding = 2.0 * N * (base + R * (d_in + d_out)), 2.0 * base * (G * R + N)
        self.base_flop, self.forward_flop = 2.0 * N * base, products + 2.0 * G * gate
        self.folded_forward_flop = folding + 2.0 * G * gate
        gate_backward = 2.0 * G * gate + 2 * newest
        self.backward_flop = products + linear * 2 * hidden + gate_backward
        dz = linear * min(folding, 2.0 * hidden * (d_in + d_out))
        self.folded_backward_flop = 2.0 * N * base + dz + gate_backward

        # x and A in, H and z out; x, H, z, base and B in, y out
        self.forward_bytes = (x + A + gate + hidden + x + hidden + base + B + y) * item + 2 * values
        # the three GEMMs gate H in place, and read y again for the last product
        self.chain_bytes = self.forward_bytes + 2 * (hidden + y) * item
        # dy, B, saved H in, u and dz out; dy, u, base, A, gates, z and dz in, dx out; x for the newest gate
        moved = y + B + 2 * hidden + y + hidden + base + A + x + gate + newest
        self.backward_bytes = moved * item + (2 + linear) * values
        # W₀, A and B in, W_eff out once per gate vector; x and W_eff in, y out; the gates read x before
        self.folded_forward_bytes = (base + A + B + 2 * weights + x + y + linear * (x + gate)) * item
        self.folded_backward_bytes = (weights + x + y + x + linear * (gate + y)) * item


def count(case: KernelCase) -> Count:
    """Of the forward pass, or of forward and backward together, by the cheaper algorithm."""
    w, back = Work(case), case.backward
    low_rank = w.forward_flop + back * w.backward_flop
    folded = w.folded_forward_flop + back * w.folded_backward_flop
    base = w.base_flop * (1 + back)
    if folded < low_rank:
        return Count(folded, "folded", base, w.folded_forward_bytes + back * w.folded_backward_bytes)
    return Count(low_rank, "low-rank", base, w.forward_bytes + back * w.backward_bytes)


def ceilings(
    dtypes: Iterable[str], device: torch.device, gemm_size: int = 0, copy_bytes: int = 0
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
    """x weightᵀ in every library here: `F.linear`, on CPUs also oneDNN by an operator that is not public."""
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
    return min(timed(run, device)[0] for _ in range(repetitions))
