"""What the hardware allows: operations and bytes of a case, two measured ceilings, and the time below which
nothing can run.

With N tokens, T experts of rank r, R = T·r and G gate vectors (one per token, sample or batch), operations
(multiply-adds count two):

    low-rank forward   2N (d_in d_out + R (d_in + d_out)) + 2GT d_in
    folded forward     2 d_in d_out (GR + N) + 2GT d_in
    low-rank backward  the same products with u = dy B_catᵀ for H, then 2NR for dz and 2G d_in for the newest
    gate folded backward    2N d_in d_out for x, and for dz the cheaper of dyᵀx or the low-rank u and H

Bytes: two launches, shrink and expand, and again two for the backward pass; each reads each of its inputs
    once and writes each of its
outputs once, gate values in fp32.  A hand-made chain of three GEMMs also carries H and y through memory
between its products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mingle.bench.registry import Case

_GATE_BYTES = 4


@dataclass(frozen=True)
class Count:
    """Operations of the cheaper algorithm, its name, those of the base layer alone, and bytes."""

    flop: float
    algorithm: str
    base_flop: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flop / self.bytes


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to do: operations per second by dtype, and bytes per second of a copy,
    read and written.
    """

    flop_per_second: dict[str, float]
    bytes_per_second: float


def count(case: Case) -> Count:
    """Of the forward pass, or of forward and backward together."""
    low_rank, folded = forward_flop(case), folded_forward_flop(case)
    moved, base = forward_bytes(case), 2.0 * case.rows * case.d_in * case.d_out
    if case.backward:
        low_rank, folded = low_rank + backward_flop(case), folded + folded_backward_flop(case)
        moved, base = moved + backward_bytes(case), 2 * base
    if folded < low_rank:
        return Count(folded, "folded", base, folded_bytes(case))
    return Count(low_rank, "low-rank", base, moved)


def forward_flop(case: Case) -> float:
    R = _active(case) * case.rank
    return 2.0 * case.rows * (case.d_in * case.d_out + R * (case.d_in + case.d_out)) + _gate_flop(case)


def folded_forward_flop(case: Case) -> float:
    R = _active(case) * case.rank
    return 2.0 * case.d_in * case.d_out * (case.groups * R + case.rows) + _gate_flop(case)


def backward_flop(case: Case) -> float:
    """Of the gradients of x and the newest gate, everything else being frozen."""
    R = _active(case) * case.rank
    products = 2.0 * case.rows * (case.d_in * case.d_out + R * (case.d_in + case.d_out))
    if case.routed:
        return products
    return products + 2 * case.rows * R + _gate_flop(case) + 2 * case.groups * case.d_in


def folded_backward_flop(case: Case) -> float:
    R = _active(case) * case.rank
    dx = 2.0 * case.rows * case.d_in * case.d_out
    if case.routed:
        return dx
    outer = 2.0 * case.d_in * case.d_out * (case.rows + case.groups * R)
    return (
        dx
        + min(outer, 2.0 * case.rows * R * (case.d_in + case.d_out))
        + _gate_flop(case)
        + 2 * case.groups * case.d_in
    )


def forward_bytes(case: Case) -> float:
    """Of two launches: x and the shrinking half in, H and z out; x, H, z, base and the expanding half in, y
    out.
    """
    n, hidden, gates = (
        case.rows,
        case.rows * _active(case) * case.rank,
        case.groups * case.experts * _GATE_BYTES,
    )
    shrink = n * case.d_in + _stored(case) * case.rank * case.d_in + _gate_size(case) + hidden
    expand = (
        n * case.d_in + hidden + _base_size(case) + _stored(case) * case.rank * case.d_out + n * case.d_out
    )
    return (shrink + expand) * _item(case) + 2 * gates


def chain_bytes(case: Case) -> float:
    """Of the forward pass as three GEMMs: H is gated in place, and y is read again by the last product."""
    again = 2 * case.rows * _active(case) * case.rank + 2 * case.rows * case.d_out
    return forward_bytes(case) + again * _item(case)


def backward_bytes(case: Case) -> float:
    """Of two launches: dy, B and the saved H in, u and dz out; dy, u, base, A, the gates and z, dz in, dx
    out; x for the newest gate.
    """
    n, hidden, gates = (
        case.rows,
        case.rows * _active(case) * case.rank,
        case.groups * case.experts * _GATE_BYTES,
    )
    upstream = n * case.d_out + _stored(case) * case.rank * case.d_out + 2 * hidden
    expand = (
        n * case.d_out + hidden + _base_size(case) + _stored(case) * case.rank * case.d_in + n * case.d_in
    )
    gate = 0 if case.routed else _gate_size(case) + case.groups * case.d_in
    return (upstream + expand + gate) * _item(case) + (2 if case.routed else 3) * gates


def folded_bytes(case: Case) -> float:
    """W₀, A and B in, W_eff out once per gate vector; then x and W_eff in, y out; the gates read x before.
    Backward likewise with dy.
    """
    n, weights = case.rows, case.groups * case.d_in * case.d_out
    fold = case.d_in * case.d_out + _stored(case) * case.rank * (case.d_in + case.d_out) + weights
    forward = (
        fold
        + weights
        + n * (case.d_in + case.d_out)
        + (0 if case.routed else n * case.d_in + _gate_size(case))
    )
    backward = (
        weights
        + n * (case.d_in + case.d_out)
        + n * case.d_in
        + (0 if case.routed else _gate_size(case) + n * case.d_out)
    )
    return (forward + backward * case.backward) * _item(case)


def ceilings(
    dtypes: Iterable[str], device: torch.device, gemm_size: int | None = None, copy_bytes: int | None = None
) -> Ceilings:
    """Measured now: the fastest of several large products per dtype, and of several large copies."""
    cuda = device.type == "cuda"
    size = gemm_size or (8192 if cuda else 1536)
    rates = {}
    for dtype in sorted(set(dtypes)):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        rates[dtype] = 2.0 * size**3 / min(_fastest(product, device) for product in products(a, b))
    source = torch.zeros(copy_bytes or (2**30 if cuda else 2**27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(rates, 2.0 * source.numel() / _fastest(lambda: target.copy_(source), device))


def floor(case: Case, limits: Ceilings) -> tuple[float, str]:
    """Seconds that the case takes at least, and which ceiling says so."""
    needed = count(case)
    arithmetic, memory = (
        needed.flop / limits.flop_per_second[case.dtype],
        needed.bytes / limits.bytes_per_second,
    )
    return max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory"


def products(x: torch.Tensor, weight: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """x weightᵀ in every library that PyTorch has for it here: `F.linear`, and on CPUs oneDNN through an
    operator that is not public.
    """
    found: list[Callable[[], torch.Tensor]] = [lambda: F.linear(x, weight)]
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        try:
            operator = torch.ops.mkldnn._linear_pointwise
            if torch.allclose(
                operator(x[:2], weight, None, "none", [], "").float(),
                F.linear(x[:2], weight).float(),
                rtol=0.1,
                atol=0.1,
            ):
                found.append(lambda: operator(x, weight, None, "none", [], ""))
        except (AttributeError, RuntimeError):
            pass
    return found


def _fastest(run: Callable[[], object], device: torch.device, repetitions: int = 6) -> float:
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


def _active(case: Case) -> int:
    """Experts that a token uses."""
    return 1 if case.routed else case.experts


def _stored(case: Case) -> int:
    """Experts that are read at all."""
    return min(case.experts, case.samples) if case.routed else case.experts


def _gate_flop(case: Case) -> float:
    return 0.0 if case.routed else 2.0 * case.groups * case.experts * case.d_in


def _gate_size(case: Case) -> int:
    return 0 if case.routed else case.experts * case.d_in


def _base_size(case: Case) -> int:
    return case.d_in * case.d_out


def _item(case: Case) -> int:
    return case.torch_dtype.itemsize
