"""Ways to the leading singular triplets of matrices, and to the experts of a task that is not the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mingle import linalg
from mingle.bench.decomposition.cases import (
    ACCURATE,
    EXACT,
    FAST,
    PUBLISHED,
    SKETCH,
    THIN,
    ExpertProblem,
    LayerShape,
)
from mingle.bench.measure import OURS
from mingle.methods.experts import concatenated, make_experts
from mingle.nn.linear import LowRankExpert

#: U [b, m, r], S [b, r], Vh [b, r, n]
Triplets = tuple[Tensor, Tensor, Tensor]
#: of M [b, m, n] and the rank r
Decompose = Callable[[Tensor, int], Triplets]
#: B [m, r] and A [r, n] by layer
Factors = list[tuple[Tensor, Tensor]]
#: a side from which on a full decomposition takes seconds on a CPU, so that curves get fewer points
LARGE = 4096


@dataclass(frozen=True)
class ExpertPeer:
    """One way with one setting; `run` makes triplets or factors of a problem.

    One that is not `batched` works layer by layer, so that one tells the time of all.  `telling` settings are
    run on large matrices too; `limit` bounds the excess residual; `facts` are said of its row.
    """

    name: str
    run: Callable[[ExpertProblem], Any]
    limit: float
    facts: dict[str, str] = field(default_factory=dict)
    batched: bool = True
    telling: bool = True
    full: bool = False

    def left_out(self, shape: LayerShape) -> str | None:
        """Why it is not run on this shape; None where it is."""
        large = shape.shorter >= LARGE
        if large and not self.telling:
            return "one point of the curve among others; the telling ones are run"
        if self.full and max(shape.m, shape.n) > LARGE:
            return "square orthogonal factors of this size take minutes and gigabytes"
        if self.full and large and shape.m == shape.n and self.name != PUBLISHED:
            return "of a large square matrix the thin decomposition is the full one"
        return "takes minutes at this size" if large and "gesvd" in self.name.split() else None


def decomposition(
    method: str, setting: str, run: Decompose, limit: float, curve: str = "", label: str = "", **options: bool
) -> ExpertPeer:
    """A point on the curve of its method or of a fixed parameter, labelled by the setting or what varies."""
    facts = {"method": method, "setting": setting, "curve": curve or method, "label": label or setting}
    return ExpertPeer(f"{method} {setting}", lambda p: run(p.deltas, p.rank), limit, facts, **options)


def peers(device: torch.device) -> tuple[ExpertPeer, ...]:
    """All that decompose and can run there, ours first, the slow ones last."""
    gram = decomposition("Gram matrix, fp64", "eigh", gram_eigh, EXACT, batched=False)
    found = [*_ours(), *_sketches(), gram]
    settings: tuple[tuple[str, str | None], ...] = ("thin", None), ("full", None)
    if device.type == "cuda":  # cuSOLVER's drivers; on a CPU LAPACK's divide and conquer
        thin = tuple((f"thin {driver}", driver) for driver in ("gesvda", "gesvdj", "gesvd"))
        settings = *thin, ("full gesvd", "gesvd")
    for name, driver in settings:
        full, batched = name.startswith("full"), driver == "gesvda"
        run = full_svd(full, driver)
        found.append(decomposition("torch.linalg.svd", name, run, EXACT, batched=batched, full=full))
    return tuple(found)


def _ours() -> list[ExpertPeer]:
    """Named by the vectors that iterate for rank 64, and by the power iterations."""

    def point(
        name: str, extra: int, limit: float, label: str = "", telling: bool = True, **options: Any
    ) -> ExpertPeer:
        def run(M: Tensor, r: int) -> Triplets:
            return linalg.svd_lowrank(M, r, **options)

        curve = f"{OURS}, {64 + extra} vectors, by power iterations"
        return decomposition(OURS, name, run, limit, curve, label, telling=telling)

    def setting(extra: int, q: int) -> ExpertPeer:
        telling, options = extra == 64 and q in (2, 4), dict(oversample=extra, power_iters=q)
        return point(f"{64 + extra}/{q}", extra, SKETCH, str(q), telling, **options)

    exact = [point(ACCURATE.removeprefix(f"{OURS} "), 64, EXACT), point("fast", 32, FAST, mode="fast")]
    return exact + [setting(64, q) for q in (0, 1, 2, 4, 12)] + [setting(32, q) for q in (1, 3, 12)]


def _sketches() -> list[ExpertPeer]:
    def setting(q: int, niter: int, telling: bool) -> ExpertPeer:
        def run(M: Tensor, r: int) -> Triplets:
            U, S, V = torch.svd_lowrank(M, min(q, *M.shape[-2:]), niter)
            return U[..., :r], S[..., :r], V[..., :r].mT

        method, curve = "torch.svd_lowrank", f"torch.svd_lowrank, q = {q}, by niter"
        return decomposition(method, f"{q}/{niter}", run, SKETCH, curve, str(niter), telling=telling)

    narrow = [setting(64, niter, niter == 2) for niter in (2, 8, 16)]
    return narrow + [setting(128, niter, niter in (2, 4, 8)) for niter in (0, 1, 2, 4, 8, 12)]


def gram_eigh(M: Tensor, r: int) -> Triplets:
    """From the eigenvectors of the smaller Gram matrix in float64, by a library's solver."""
    if M.shape[-2] < M.shape[-1]:
        V, S, Uh = gram_eigh(M.mT, r)
        return Uh.mT, S, V.mT
    wide = M.double()
    V = torch.linalg.eigh(wide.mT @ wide)[1].flip(-1)[..., :r]
    images = wide @ V
    S = images.norm(dim=-2)
    return (images / S.unsqueeze(-2)).to(M.dtype), S.to(M.dtype), V.mT.to(M.dtype)


def full_svd(full_matrices: bool, driver: str | None = None) -> Decompose:
    def run(M: Tensor, r: int) -> Triplets:
        U, S, Vh = torch.linalg.svd(M, full_matrices=full_matrices, driver=driver)
        return U[..., :r], S[..., :r], Vh[..., :r, :]

    return run


def pipelines(device: torch.device) -> tuple[ExpertPeer, ...]:
    """From Δ and earlier experts to new ones, ours first.  On a GPU the published one asks for gesvd."""
    driver = "gesvd" if device.type == "cuda" else None
    own = {"note": "mingle.methods.experts.make_experts"}
    by_library = {"note": "thin factors all the way: QR of both, SVD of the core in fp64, then a sketch"}
    thin = {"note": "the published procedure with full_matrices=False"}
    dense = {"note": "dense S = Σ B_i A_i and Δ', both decomposed with full_matrices=True"}
    return (
        ExpertPeer(OURS, ours, EXACT, own),
        ExpertPeer("QR, then torch.svd_lowrank 128/8", library, 1e-3, by_library),
        ExpertPeer(THIN, decomposed_twice(False, driver), EXACT, thin, batched=False),
        ExpertPeer(PUBLISHED, decomposed_twice(True, driver), EXACT, dense, batched=False, full=True),
    )


def ours(problem: ExpertProblem) -> Factors:
    deltas = {f"layers.{i}": delta for i, delta in enumerate(problem.deltas)}
    earlier = {f"layers.{i}": experts for i, experts in enumerate(problem.earlier)}
    return [(expert.B, expert.A) for expert in make_experts(deltas, earlier, problem.rank).values()]


def decomposed_twice(full: bool, driver: str | None = None) -> Callable[[ExpertProblem], Factors]:
    """Layer by layer: decompose the dense sum of the earlier updates, zero the leading block of Uᵀ Δ V,
    decompose what is left.  With thin factors Uᵀ Δ V does not hold all of Δ, and the block is subtracted
    instead.
    """

    def expert(delta: Tensor, experts: tuple[LowRankExpert, ...], r: int) -> tuple[Tensor, Tensor]:
        merged = torch.stack([expert.delta() for expert in experts]).sum(0)
        U, S, Vh = torch.linalg.svd(merged, full_matrices=full, driver=driver)
        leading = effective_rank(S)
        if full:
            core = U.mT @ delta @ Vh.mT
            core[:leading, :leading] = 0
            projected = U @ core @ Vh
        else:
            U, Vh = U[:, :leading], Vh[:leading]
            projected = delta - U @ (U.mT @ delta @ Vh.mT) @ Vh
        U, S, Vh = torch.linalg.svd(projected, full_matrices=full, driver=driver)
        return U[:, :r], S[:r, None] * Vh[:r]

    return lambda p: [expert(*layer, p.rank) for layer in zip(p.deltas, p.earlier, strict=True)]


def library(problem: ExpertProblem) -> Factors:
    """What the same thought yields with PyTorch's own functions, the layers of a GPU in one batch."""
    pairs = [concatenated(experts) for experts in problem.earlier]
    B, A = (torch.stack(part).double() for part in zip(*pairs, strict=True))
    (left, upper), (right, lower) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
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
