"""What the hardware allows: two measured ceilings, and the time that a case takes at least by its work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mingle.bench.gated_experts.cases import KernelCase
from mingle.bench.measure import timed
from mingle.kernels.gated_experts.cost import Work


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


def work(case: KernelCase) -> Work:
    """Operations and bytes of a case; where a router gives the gates, a token uses one expert."""
    active, stored = (1, min(case.experts, case.samples)) if case.routed else (case.experts, case.experts)
    sizes = dict(tokens=case.rows, groups=case.groups, d_in=case.d_in, d_out=case.d_out, rank=case.rank)
    experts = dict(experts=case.experts, active=active, stored=stored)
    return Work(**sizes, **experts, itemsize=case.torch_dtype.itemsize, linear_gates=not case.routed)


def count(case: KernelCase) -> Count:
    """Of the forward pass, or of forward and backward together, by the cheaper algorithm."""
    w, back = work(case), case.backward
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
