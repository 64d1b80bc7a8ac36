"""What is decomposed: the layers of one task, task vectors with a stated spectrum, and the experts of the
tasks before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mingle.nn.linear import LowRankExpert

#: of every task vector, up to a factor
SPECTRUM = "σ_k ∝ k^-½ (1 + 3 exp(−k/16)): a slow tail under a head of some sixteen directions; entries 1e-3 in root mean square, fp32"
_ENTRY = 1e-3


@dataclass(frozen=True)
class Shape:
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
class Case:
    """The layers of a task that follows `earlier` others, each with one expert of `rank` per layer."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    rank: int = 64
    earlier: int = 7


# fmt: off
CASES = {case.name: case for case in (
    Case("vit-b", "one ViT-B task", (Shape(768, 768, 48), Shape(3072, 768, 12), Shape(768, 3072, 12))),
    Case("vit-l", "one ViT-L task", (Shape(1024, 1024, 96), Shape(4096, 1024, 24), Shape(1024, 4096, 24))),
    # two layers of 14336×4096 and one of 4096×14336, on which LAPACK takes longer: counted as a third tall
    # one
    Case("llm", "one block of a 4096-wide language model", (Shape(4096, 4096, 4), Shape(14336, 4096, 3))),
)}
# fmt: on


def spectrum(count: int) -> Tensor:
    """`SPECTRUM`'s first values, float64, with a norm of one."""
    k = torch.arange(1, count + 1, dtype=torch.float64)
    values = k.rsqrt() * (1 + 3 * torch.exp(-k / 16))
    return values / values.norm()


@dataclass(frozen=True)
class Problem:
    """The same shape once or several times: Δ [layers, m, n], and by layer the experts of earlier tasks."""

    shape: Shape
    rank: int
    deltas: Tensor
    earlier: tuple[tuple[LowRankExpert, ...], ...]

    @property
    def layers(self) -> int:
        return len(self.deltas)

    def first(self) -> Problem:
        """Its first layer alone."""
        return Problem(self.shape, self.rank, self.deltas[:1], self.earlier[:1])


def make(case: Case, shape: Shape, layers: int, device: torch.device, seed: int = 0) -> Problem:
    """A task's Δ of this shape and what came before; the earlier experts are the best approximations of task
    vectors like it.
    """
    generator = torch.Generator().manual_seed(seed)
    pattern = _mixed(shape, generator, device)
    deltas = torch.stack([_shuffled(pattern, generator) for _ in range(layers)])
    earlier = [
        tuple(LowRankExpert.from_dense(_shuffled(pattern, generator), case.rank) for _ in range(case.earlier))
        for _ in range(layers)
    ]
    return Problem(shape, case.rank, deltas, tuple(earlier))


def _mixed(shape: Shape, generator: torch.Generator, device: torch.device) -> Tensor:
    """A matrix [m, n] in float64 with this spectrum and singular vectors without any structure.

    Random orthogonal factors of 14336 rows take minutes; fast Hartley transforms of random signs, twice over,
    take seconds.
    """
    M = torch.zeros(shape.m, shape.n, dtype=torch.float64, device=device)
    M.diagonal().copy_(spectrum(shape.shorter) * _ENTRY * (shape.m * shape.n) ** 0.5)
    for _ in range(2):
        M = _hartley(M * _signs(shape.n, generator, device))
        M = _hartley(M.mT * _signs(shape.m, generator, device)).mT
    return M


def _hartley(rows: Tensor) -> Tensor:
    """The discrete Hartley transform of every row, which is orthogonal."""
    transformed = torch.fft.fft(rows)
    return (transformed.real - transformed.imag) / rows.shape[-1] ** 0.5


def _shuffled(M: Tensor, generator: torch.Generator) -> Tensor:
    """M in fp32 with rows and columns permuted and their signs drawn anew: as many singular values,
    directions that know nothing of M's.
    """
    m, n = M.shape
    rows, columns = (torch.randperm(size, generator=generator).to(M.device) for size in (m, n))
    left, right = (_signs(size, generator, M.device) for size in (m, n))
    return (M[rows][:, columns] * left.unsqueeze(1) * right).float()


def _signs(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return (torch.randint(2, (count,), generator=generator) * 2 - 1).to(device)


def total_layers(shapes: Sequence[Shape]) -> int:
    return sum(shape.count for shape in shapes)
