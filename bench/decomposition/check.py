"""Correctness before speed: decompositions and experts against float64 LAPACK."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mingle.bench.decomposition.cases import ExpertProblem
from mingle.bench.decomposition.peers import Factors, Triplets, projected

# Beside the excess residual: max |UᵀU − I|, and of V, which LAPACK's fp32 keeps for 14336 rows, and the
# largest singular value, which every sketch finds.  Of our orthogonality more is asked.
LIMITS = {"orthogonality": 2e-5, "leading value": 1e-2}
OUR_LIMITS = LIMITS | {"orthogonality": 2e-6}
_ERRORS = ("excess", *LIMITS, "values")
#: a shorter side up to which singular values are LAPACK's own; beyond, the Gram matrix's, ten times as fast
_DIRECT = 1100


@dataclass(frozen=True)
class Optimum:
    """The best a rank allows for M [m, n], in float64: ‖M − M_r‖ and the leading singular values σ [r]."""

    M: Tensor
    residual: float
    sigma: Tensor

    @classmethod
    def of(cls, M: Tensor, r: int) -> Optimum:
        M = M.double()
        if min(M.shape) <= _DIRECT:
            squares = torch.linalg.svdvals(M).square()
        else:
            rows = M if M.shape[0] <= M.shape[1] else M.mT
            squares = torch.linalg.eigvalsh(rows @ rows.mT).flip(0).clamp_min(0)
        return cls(M, float(squares[r:].sum().sqrt()), squares[:r].sqrt())

    def errors(self, *parts: Tensor) -> list[float]:
        """Of B and A ‖M − B A‖ over the least possible, less one; of U, S and Vh all `_ERRORS`."""
        left, *S, right = (part.double() for part in parts)
        excess = float((self.M - (left * S[0] if S else left) @ right).norm()) / self.residual - 1
        if not S:
            return [excess]
        identity = torch.eye(len(right), dtype=torch.float64, device=right.device)
        off = max(float((gram - identity).abs().max()) for gram in (left.mT @ left, right @ right.mT))
        values = ((S[0] - self.sigma) / self.sigma).abs()
        return [excess, off, float(values[0]), float(values.max())]


#: of the first and the last layer
Optima = Mapping[int, Optimum]


def optima(problem: ExpertProblem) -> Optima:
    return {i: Optimum.of(problem.deltas[i], problem.rank) for i in {0, problem.layers - 1}}


def projected_optima(problem: ExpertProblem) -> tuple[Optima, list[int]]:
    """The same for Δ without the leading block of the earlier updates, and that block's size."""
    ends = sorted({0, problem.layers - 1})
    parts = [projected(problem.deltas[i, None].double(), problem.earlier[i : i + 1]) for i in ends]
    found = {i: Optimum.of(rest[0], problem.rank) for i, (rest, _) in zip(ends, parts, strict=True)}
    return found, [leading for _, (leading,) in parts]


def decomposition_errors(result: Triplets, expected: Optima) -> dict[str, float]:
    return _worst(list(zip(*result, strict=False)), expected, _ERRORS)


def expert_errors(result: Factors, expected: Optima) -> dict[str, float]:
    return _worst(result, expected, _ERRORS[:1])


def _worst(result: Sequence[tuple[Tensor, ...]], expected: Optima, names: Sequence[str]) -> dict[str, float]:
    """Of the layers looked at; infinite where a layer is missing, a shape wrong or an entry not finite."""
    found = dict.fromkeys(names, -math.inf)
    for i, optimum in expected.items():
        parts, (m, n), r = result[i] if i < len(result) else (), optimum.M.shape, len(optimum.sigma)
        right = [tuple(part.shape) for part in parts] == [(m, r), *[(r,)] * (len(parts) - 2), (r, n)]
        errors = optimum.errors(*parts) if right else [math.inf] * len(names)
        for name, error in zip(names, errors, strict=True):
            found[name] = max(found[name], math.inf if math.isnan(error) else error)
    return found
