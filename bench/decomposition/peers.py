"""Ways to the leading singular triplets of matrices, and to the experts of a task that is not the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mingle import linalg
from mingle.bench.decomposition.cases import EXACT, FAST, PUBLISHED, SKETCH, THIN, ExpertProblem, LayerShape
from mingle.bench.measure import OURS
from mingle.methods.experts import concatenated, make_experts
from mingle.nn.low_rank_expert import LowRankExpert

#: U [b, m, r], S [b, r], Vh [b, r, n]
Triplets = tuple[Tensor, Tensor, Tensor]
#: B [m, r] and A [r, n] by layer
Factors = list[tuple[Tensor, Tensor]]
#: a side from which on a full decomposition takes seconds on a CPU, so that curves get fewer points
LARGE = 4096
# Curves: by the vectors that iterate for rank 64 the numbers of power iterations, and which are `telling`.
_OURS = {128: (0, 1, 2, 4, 12), 96: (1, 3, 12)}
_THEIRS = {64: (2, 8, 16), 128: (0, 1, 2, 4, 8, 12)}
_TELLING = ("64/2", "128/2", "128/4", "128/8")


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
    method: str, setting: str, run: Callable[[Tensor, int], Triplets], limit: float, curve: str = "",
    label: str = "", **options: bool,
) -> ExpertPeer:  # fmt: skip
    """A point on the curve of its method or of a fixed parameter, labelled by the setting or what varies."""
    facts = {"method": method, "setting": setting, "curve": curve or method, "label": label or setting}
    return ExpertPeer(f"{method} {setting}", lambda p: run(p.deltas, p.rank), limit, facts, **options)


def peers(device: torch.device) -> tuple[ExpertPeer, ...]:
    """All that decompose and can run there, ours first, the slow ones last."""
    curve, fast = f"{OURS}, {{}} vectors, by power iterations", partial(linalg.svd_lowrank, mode="fast")
    found = [
        decomposition(OURS, "accurate", linalg.svd_lowrank, EXACT, curve.format(128)),
        decomposition(OURS, "fast", fast, FAST, curve.format(96)),
        *_curves(OURS, curve, _our_sketch, _OURS),
        *_curves("torch.svd_lowrank", "torch.svd_lowrank, q = {}, by niter", _sketch, _THEIRS),
        decomposition("Gram matrix, fp64", "eigh", gram_eigh, EXACT, batched=False),
    ]
    settings: dict[str, str | None] = {"thin": None, "full": None}
    if device.type == "cuda":  # cuSOLVER's drivers; on a CPU LAPACK's divide and conquer
        thin = {f"thin {driver}": driver for driver in ("gesvda", "gesvdj", "gesvd")}
        settings = {**thin, "full gesvd": "gesvd"}
    for name, driver in settings.items():
        full, batched = name.startswith("full"), driver == "gesvda"
        run = partial(_svd, full=full, driver=driver)
        found.append(decomposition("torch.linalg.svd", name, run, EXACT, batched=batched, full=full))
    return tuple(found)


def _curves(
    method: str, curve: str, run: Callable[..., Triplets], points: Mapping[int, Sequence[int]]
) -> list[ExpertPeer]:
    def point(q: int, n: int) -> ExpertPeer:
        name, at = f"{q}/{n}", partial(run, q=q, n=n)
        return decomposition(method, name, at, SKETCH, curve.format(q), str(n), telling=name in _TELLING)

    return [point(q, n) for q, numbers in points.items() for n in numbers]


def _our_sketch(M: Tensor, r: int, q: int, n: int) -> Triplets:
    return linalg.svd_lowrank(M, r, oversample=q - 64, power_iters=n)


def _sketch(M: Tensor, r: int, q: int, n: int) -> Triplets:
    U, S, V = torch.svd_lowrank(M, min(q, *M.shape[-2:]), n)
    return U[..., :r], S[..., :r], V[..., :r].mT


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


def _svd(M: Tensor, r: int, full: bool, driver: str | None) -> Triplets:
    U, S, Vh = torch.linalg.svd(M, full_matrices=full, driver=driver)
    return U[..., :r], S[..., :r], Vh[..., :r, :]


def pipelines(device: torch.device) -> tuple[ExpertPeer, ...]:
    """From Δ and earlier experts to new ones, ours first.  On a GPU the published one asks for gesvd."""
    driver = "gesvd" if device.type == "cuda" else None
    thin, full = (partial(decomposed_twice, full=full, driver=driver) for full in (False, True))
    by_library = "thin factors all the way: QR of both, SVD of the core in fp64, then a sketch"
    by_thin = "the published procedure with full_matrices=False"
    by_full = "dense S = Σ B_i A_i and Δ', both decomposed with full_matrices=True"
    return (
        ExpertPeer(OURS, ours, EXACT, {"note": "mingle.methods.experts.make_experts"}),
        ExpertPeer("QR, then torch.svd_lowrank 128/8", library, 1e-3, {"note": by_library}),
        ExpertPeer(THIN, thin, EXACT, {"note": by_thin}, batched=False),
        ExpertPeer(PUBLISHED, full, EXACT, {"note": by_full}, batched=False, full=True),
    )


def ours(problem: ExpertProblem) -> Factors:
    deltas = {f"layers.{i}": delta for i, delta in enumerate(problem.deltas)}
    earlier = {f"layers.{i}": experts for i, experts in enumerate(problem.earlier)}
    return [(expert.B, expert.A) for expert in make_experts(deltas, earlier, problem.rank).values()]


def library(problem: ExpertProblem) -> Factors:
    """What the same thought yields with PyTorch's own functions, the layers of a GPU in one batch."""
    rest, _ = projected(problem.deltas, problem.earlier)
    U, S, Vh = _sketch(rest, problem.rank, 2 * problem.rank, 8)
    return list(zip(U, S.unsqueeze(-1) * Vh, strict=True))


def projected(deltas: Tensor, earlier: Sequence[Sequence[LowRankExpert]]) -> tuple[Tensor, list[int]]:
    """Δ [b, m, n] without the leading block of the earlier updates, which is found from thin factors in
    float64, and the size of that block in each layer.
    """
    B, A = (torch.stack(part).double() for part in zip(*map(concatenated, earlier), strict=True))
    (left, upper), (right, lower) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    U, V = (left @ U).to(deltas.dtype), (right @ Vh.mT).to(deltas.dtype)
    core, ranks = U.mT @ deltas @ V, [effective_rank(sigma) for sigma in S]
    for block, rank in zip(core, ranks, strict=True):
        block[rank:], block[:, rank:] = 0, 0
    return deltas - U @ core @ V.mT, ranks


def decomposed_twice(problem: ExpertProblem, full: bool, driver: str | None) -> Factors:
    """Layer by layer: decompose the dense sum of the earlier updates, then Δ without its leading block."""
    found = []
    for delta, experts in zip(problem.deltas, problem.earlier, strict=True):
        merged = torch.stack([expert.delta() for expert in experts]).sum(0)
        U, S, Vh = _svd(without_leading(delta, merged, full, driver), problem.rank, full, driver)
        found.append((U, S[:, None] * Vh))
    return found


def without_leading(delta: Tensor, earlier: Tensor, full: bool = True, driver: str | None = None) -> Tensor:
    """Δ without the block that the leading directions of the dense earlier update span, as published.  With
    thin factors Uᵀ Δ V does not hold all of Δ, and the block is subtracted instead of set to zero.
    """
    U, S, Vh = torch.linalg.svd(earlier, full_matrices=full, driver=driver)
    rank = effective_rank(S)
    if not full:
        U, Vh = U[:, :rank], Vh[:rank]
        return delta - U @ (U.mT @ delta @ Vh.mT) @ Vh
    core = U.mT @ delta @ Vh.mT
    core[:rank, :rank] = 0
    return U @ core @ Vh


def effective_rank(sigma: Tensor) -> int:
    """int(exp(−Σ p ln p)) with p = σ / Σσ, as published."""
    p = sigma / sigma.sum()
    return int(math.exp(-torch.xlogy(p, p).sum().item()))
