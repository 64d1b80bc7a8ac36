"""What is decomposed: the layers of a task, task vectors with a stated spectrum, and earlier experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mingle.bench.judge import Target
from mingle.nn.low_rank_expert import LowRankExpert

#: of every task vector, up to a factor
SPECTRUM = """σ_k ∝ k^-½ (1 + 3 exp(−k/16)): a slow tail under a head of some sixteen directions; \
entries 1e-3 in root mean square, fp32"""
_ENTRY = 1e-3
#: the excess residual that a result may have; a sketch's is a matter of degree, and shown
EXACT, FAST, SKETCH = 1e-5, 1e-4, 0.5
ACCURATE, PUBLISHED, THIN = "mingle accurate", "published: full SVD twice", "thin SVD twice"


@dataclass(frozen=True)
class LayerShape:
    """`count` layers of a task whose weight is [m, n]."""

    m: int
    n: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.m}×{self.n}"

    @property
    def shorter(self) -> int:
        return min(self.m, self.n)


@dataclass(frozen=True)
class ExpertCase:
    """The layers of a task that follows `earlier` others, each with one expert of `rank` per layer."""

    name: str
    title: str
    shapes: tuple[LayerShape, ...]
    rank: int = 64
    earlier: int = 7

    @property
    def layers(self) -> int:
        return sum(shape.count for shape in self.shapes)


_VIT_B = LayerShape(768, 768, 48), LayerShape(3072, 768, 12), LayerShape(768, 3072, 12)
_VIT_L = LayerShape(1024, 1024, 96), LayerShape(4096, 1024, 24), LayerShape(1024, 4096, 24)
# two layers of 14336×4096 and one of 4096×14336, on which LAPACK takes longer: counted as a third tall one
_LLM = LayerShape(4096, 4096, 4), LayerShape(14336, 4096, 3)
CASES = {
    "vit-b": ExpertCase("vit-b", "one ViT-B task", _VIT_B),
    "vit-l": ExpertCase("vit-l", "one ViT-L task", _VIT_L),
    "llm": ExpertCase("llm", "one block of a 4096-wide language model", _LLM),
}
TARGETS = (
    Target("vit-b project", PUBLISHED, 3.0, device="cpu", error=EXACT),
    Target("vit-b project", THIN, 1.6, device="cpu", error=EXACT),
    Target("llm decompose 4096×4096", "torch.linalg.svd thin", 15.0, ACCURATE, device="cpu", error=EXACT),
    Target("vit-b project", PUBLISHED, 100.0, device="cuda", error=EXACT),
    Target("vit-b decompose", "torch.svd_lowrank 128/8", 10.0, ACCURATE, device="cuda", error=EXACT),
)


def spectrum(count: int) -> Tensor:
    """`SPECTRUM`'s first values, float64, with a norm of one."""
    k = torch.arange(1, count + 1, dtype=torch.float64)
    values = k.rsqrt() * (1 + 3 * torch.exp(-k / 16))
    return values / values.norm()


@dataclass(frozen=True)
class ExpertProblem:
    """The same shape once or several times: Δ [layers, m, n], and by layer the experts of earlier tasks."""

    shape: LayerShape
    rank: int
    deltas: Tensor
    earlier: tuple[tuple[LowRankExpert, ...], ...]

    @property
    def layers(self) -> int:
        return len(self.deltas)

    def first(self) -> ExpertProblem:
        return ExpertProblem(self.shape, self.rank, self.deltas[:1], self.earlier[:1])


def make(
    case: ExpertCase, shape: LayerShape, layers: int, device: torch.device, seed: int = 0
) -> ExpertProblem:
    """A task's Δ of this shape and what came before: the best approximations of task vectors like it."""
    generator = torch.Generator().manual_seed(seed)
    pattern = _mixed(shape, generator, device)
    deltas = torch.stack([_shuffled(pattern, generator) for _ in range(layers)])

    def experts() -> Iterator[LowRankExpert]:
        for _ in range(case.earlier):
            yield LowRankExpert.from_dense(_shuffled(pattern, generator), case.rank)

    return ExpertProblem(shape, case.rank, deltas, tuple(tuple(experts()) for _ in range(layers)))


def _mixed(shape: LayerShape, generator: torch.Generator, device: torch.device) -> Tensor:
    """A matrix [m, n] in float64 with this spectrum and singular vectors without any structure.

    Random orthogonal factors of 14336 rows take minutes; Hartley transforms of random signs take seconds.
    """
    M = torch.zeros(shape.m, shape.n, dtype=torch.float64, device=device)
    M.diagonal().copy_(spectrum(shape.shorter) * _ENTRY * (shape.m * shape.n) ** 0.5)
    for _ in range(2):
        M = _hartley(M * _signs(shape.n, generator, device))
        M = _hartley(M.mT * _signs(shape.m, generator, device)).mT
    return M


def _hartley(rows: Tensor) -> Tensor:
    transformed = torch.fft.fft(rows)  # orthogonal, once divided
    return (transformed.real - transformed.imag) / rows.shape[-1] ** 0.5


def _shuffled(M: Tensor, generator: torch.Generator) -> Tensor:
    """M in fp32, rows and columns permuted, signs drawn anew: its singular values, but not its directions."""
    rows, columns = (torch.randperm(size, generator=generator).to(M.device) for size in M.shape)
    left, right = (_signs(size, generator, M.device) for size in M.shape)
    return (M[rows][:, columns] * left.unsqueeze(1) * right).float()


def _signs(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return (torch.randint(2, (count,), generator=generator) * 2 - 1).to(device)
