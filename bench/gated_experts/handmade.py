"""The sum as one would write it with PyTorch alone: in a loop, as three products, folded, or densely."""

from __future__ import annotations

import os
import shutil
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mingle.bench.gated_experts.cases import KernelCase
from mingle.bench.gated_experts.inputs import Inputs, Outputs, Pass, differentiated
from mingle.bench.measure import need
from mingle.kernels.gated_experts import reference

#: dense updates that autograd would keep for the backward pass
_MOST_BYTES = {"cpu": 4e9, "cuda": 40e9}


def loop(t: Inputs) -> Pass:
    layer = t.x, t.weight, t.bias, t.A, t.B
    return differentiated(t, lambda: reference.gated_experts(*layer, t.gate_values()))


def chained(t: Inputs) -> Pass:
    """All A side by side, the base, all B side by side added to y; gates in place where nothing is saved."""
    return differentiated(t, partial(chain, t, *t.side_by_side(), in_place=not t.case.backward))


def chain(t: Inputs, down: Tensor, up: Tensor, in_place: bool) -> Tensor:
    case, gates = t.case, t.gate_values().unsqueeze(-1)  # [samples or 1, tokens or 1, T, 1]
    hidden = F.linear(t.x, down).unflatten(-1, (case.experts, case.rank))
    hidden = (hidden.mul_(gates) if in_place else hidden * gates).reshape(case.rows, len(down))
    y = F.linear(t.x, t.weight, t.bias).flatten(0, 1)
    y = y.addmm_(hidden, up) if in_place else torch.addmm(y, hidden, up)
    return y.unflatten(0, (case.samples, case.tokens))


def compiled(t: Inputs) -> Pass:
    """The chain under torch.compile, without a place left for it to search on GPUs."""
    cuda = t.x.is_cuda
    compilers = os.environ.get("CXX", "c++"), "g++", "clang++", "cl"
    need(cuda or any(map(shutil.which, compilers)), "torch.compile needs a C++ compiler on the CPU")
    torch._dynamo.reset()  # one peer at a time: earlier ones would count towards the limit of recompilations
    down, up = t.side_by_side()
    t.all_gates()  # joined before tracing
    mode = "max-autotune" if cuda else "default"
    traced = torch.compile(chain, dynamic=False, fullgraph=True, mode=mode)

    def forward() -> Tensor:
        if cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return traced(t, down, up, in_place=False)

    run = differentiated(t, forward)
    run()
    return run


def folding(t: Inputs) -> Pass:
    """One product makes W₀ + B_cat diag(g) A_cat, one more applies it."""
    need(t.case.groups == 1, "gates differ within the batch")
    down, up = t.side_by_side()

    def forward() -> Tensor:
        gates = t.gate_values().flatten().repeat_interleave(t.case.rank)  # [R]
        return F.linear(t.x, torch.addmm(t.weight, (up * gates.unsqueeze(1)).mT, down), t.bias)

    return differentiated(t, forward)


def merge(t: Inputs, gates: Tensor) -> Tensor:
    """W₀ + Σ_i g_i B_i A_i for one gate vector [T], expert by expert."""
    weight = t.weight
    for gate, A, B in zip(gates, t.A, t.B, strict=True):
        weight = weight + gate * (B @ A)
    return weight


def per_sample(t: Inputs) -> Pass:
    need(t.case.reduce != "token", "one weight for each token")
    need(t.case.reduce != "batch", "one weight for the whole batch: see dense merge")
    _need_memory(t, t.case.samples)

    def forward() -> Tensor:
        pairs = zip(t.x, t.gate_values().flatten(0, 1), strict=True)
        return torch.stack([F.linear(x, merge(t, gates), t.bias) for x, gates in pairs])

    return differentiated(t, forward)


def dense(t: Inputs) -> Pass:
    need(t.case.groups == 1, "gates differ within the batch")
    _need_memory(t, 1)
    return differentiated(t, lambda: F.linear(t.x, merge(t, t.gate_values().flatten()), t.bias))


def _need_memory(t: Inputs, weights: int) -> None:
    kept = weights * (t.case.experts if t.case.backward else 1) * t.weight.nbytes
    need(kept <= _MOST_BYTES[t.x.device.type], f"autograd would keep {kept / 1e9:.0f} GB of dense updates")


def linear(t: Inputs, weight: Tensor | None = None) -> Pass:
    """The base layer, or another `weight`; the gates are not differentiated."""
    used = t.weight if weight is None else weight

    def run() -> Outputs:
        with torch.set_grad_enabled(t.case.backward):
            y = F.linear(t.x, used, t.bias)
        return {"y": y.detach()} | ({"x": torch.autograd.grad(y, t.x, t.dy)[0]} if t.case.backward else {})

    return run


@torch.no_grad()
def folded(t: Inputs) -> Pass:
    return linear(t, merge(t, t.gate_values().flatten(0, -2)[0]))


def single_precision(t: Inputs) -> Inputs:
    need(t.case.dtype != "float32", "the case is in fp32 already")
    return t.to(torch.float32)


def folds(case: KernelCase) -> bool:
    return case.reduce == "batch" and not case.backward
