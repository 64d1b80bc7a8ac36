"""Ways to the experts of a task that is not the first: take out what earlier experts do, then truncate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mingle.bench.decomposition.cases import Problem, Shape
from mingle.bench.decomposition.peers import EXACT, LARGE, OURS
from mingle.methods.experts import concatenated, make_experts
from mingle.nn.linear import LowRankExpert

#: B [m, r] and A [r, n] by layer
Factors = list[tuple[Tensor, Tensor]]

PUBLISHED, THIN, LIBRARY = "published: full SVD twice", "thin SVD twice", "QR, then torch.svd_lowrank 128/8"


@dataclass(frozen=True)
class Pipeline:
    """`run` makes the experts of all layers of a problem; one that is not `batched` works layer by layer."""

    name: str
    run: Callable[[Problem], Factors]
    limit: float
    note: str
    batched: bool = False
    full: bool = False
    telling: bool = True

    def left_out(self, shape: Shape) -> str | None:
        if self.full and max(shape.m, shape.n) > LARGE:
            return "square orthogonal factors of this size take minutes and gigabytes"
        return None


def pipelines(device: torch.device) -> tuple[Pipeline, ...]:
    """Ours first.  On a GPU the published procedure asks for cuSOLVER's gesvd."""
    driver = "gesvd" if device.type == "cuda" else None
    full, thin = decomposed_twice(True, driver), decomposed_twice(False, driver)
    return (
        Pipeline(OURS, ours, EXACT, "mingle.methods.experts.make_experts", batched=True),
        Pipeline(
            LIBRARY,
            library,
            1e-3,
            "thin factors all the way: QR of both, SVD of the core in fp64, then a sketch",
            batched=True,
        ),
        Pipeline(THIN, thin, EXACT, "the published procedure with full_matrices=False"),
        Pipeline(
            PUBLISHED,
            full,
            EXACT,
            "dense S = Σ B_i A_i and Δ', both decomposed with full_matrices=True",
            full=True,
        ),
    )


def ours(problem: Problem) -> Factors:
    names = [f"layers.{i}" for i in range(problem.layers)]
    deltas, earlier = (
        dict(zip(names, problem.deltas, strict=True)),
        dict(zip(names, problem.earlier, strict=True)),
    )
    return [(expert.B, expert.A) for expert in make_experts(deltas, earlier, problem.rank).values()]


def decomposed_twice(full_matrices: bool, driver: str | None = None) -> Callable[[Problem], Factors]:
    """Layer by layer: decompose the dense sum of the earlier updates, zero the leading block of Uᵀ Δ V,
    decompose what is left.

    With thin factors Uᵀ Δ V does not hold all of Δ, and the block is subtracted instead.
    """

    def expert(delta: Tensor, experts: tuple[LowRankExpert, ...], r: int) -> tuple[Tensor, Tensor]:
        merged = torch.stack([expert.delta() for expert in experts]).sum(0)
        U, S, Vh = torch.linalg.svd(merged, full_matrices=full_matrices, driver=driver)
        leading = effective_rank(S)
        if full_matrices:
            core = U.mT @ delta @ Vh.mT
            core[:leading, :leading] = 0
            projected = U @ core @ Vh
        else:
            U, Vh = U[:, :leading], Vh[:leading]
            projected = delta - U @ (U.mT @ delta @ Vh.mT) @ Vh
        U, S, Vh = torch.linalg.svd(projected, full_matrices=full_matrices, driver=driver)
        return U[:, :r], S[:r, None] * Vh[:r]

    return lambda problem: [
        expert(*layer, problem.rank) for layer in zip(problem.deltas, problem.earlier, strict=True)
    ]


def library(problem: Problem) -> Factors:
    """What the same thought yields with PyTorch's own functions, the layers of a GPU in one batch."""
    pairs = [concatenated(experts) for experts in problem.earlier]
    B, A = (torch.stack(part).double() for part in zip(*pairs, strict=True))
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.mT)
    core_U, S, core_Vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    U, V = (left @ core_U).to(problem.deltas.dtype), (right @ core_Vh.mT).to(problem.deltas.dtype)
    core = U.mT @ problem.deltas @ V
    for i, sigma in enumerate(S):
        leading = effective_rank(sigma)
        core[i, leading:], core[i, :, leading:] = 0, 0
    r = problem.rank
    U, S, V = torch.svd_lowrank(problem.deltas - U @ core @ V.mT, min(2 * r, problem.shape.shorter), 8)
    return [(U[i, :, :r], S[i, :r, None] * V[i, :, :r].mT) for i in range(problem.layers)]


def effective_rank(sigma: Tensor) -> int:
    """int(exp(−Σ p ln p)) with p = σ / Σσ, as published."""
    p = sigma / sigma.sum()
    p = p[p > 0]
    return int(torch.exp(-(p * p.log()).sum()))
