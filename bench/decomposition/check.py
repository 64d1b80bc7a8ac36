"""Correctness before speed: decompositions and experts against float64 LAPACK."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mingle.bench.decomposition.cases import ExpertProblem
from mingle.bench.decomposition.peers import Factors, Triplets, effective_rank
from mingle.methods.experts import concatenated

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

    def excess(self, approximation: Tensor) -> float:
        """‖M − approximation‖ over the least possible, less one."""
        return float((self.M - approximation).norm()) / self.residual - 1

    def errors(self, U: Tensor, S: Tensor, Vh: Tensor) -> dict[str, float]:
        U, S, Vh = U.double(), S.double(), Vh.double()
        identity = torch.eye(len(S), dtype=torch.float64, device=S.device)
        off = float(torch.maximum((U.mT @ U - identity).abs().max(), (Vh @ Vh.mT - identity).abs().max()))
        values = ((S - self.sigma) / self.sigma).abs()
        found = self.excess(U * S @ Vh), off, float(values[0]), float(values.max())
        return dict(zip(_ERRORS, found, strict=True))


#: of the first and the last layer
Optima = Mapping[int, Optimum]


def optima(problem: ExpertProblem) -> Optima:
    return {i: Optimum.of(problem.deltas[i], problem.rank) for i in {0, problem.layers - 1}}


def projected_optima(problem: ExpertProblem) -> tuple[Optima, list[int]]:
    """The same for Δ without the leading block of the earlier updates, and that block's size."""
    found, ranks = {}, []
    for i in sorted({0, problem.layers - 1}):
        B, A = (part.double() for part in concatenated(problem.earlier[i]))
        (left, upper), (right, lower) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
        U, S, Vh = torch.linalg.svd(upper @ lower.mT)
        ranks.append(rank := effective_rank(S))
        U, V, delta = left @ U[:, :rank], right @ Vh[:rank].mT, problem.deltas[i].double()
        found[i] = Optimum.of(delta - U @ (U.mT @ delta @ V) @ V.mT, problem.rank)
    return found, ranks


def decomposition_errors(result: Triplets, expected: Optima) -> dict[str, float]:
    """The worst of the layers looked at; infinite where a shape is wrong or an entry is not finite."""
    found = []
    for i, optimum in expected.items():
        (m, n), r = optimum.M.shape, len(optimum.sigma)
        parts = [part[i] for part in result] if i < len(result[0]) else []
        right = [tuple(part.shape) for part in parts] == [(m, r), (r,), (r, n)]
        found.append(optimum.errors(*parts) if right else dict.fromkeys(_ERRORS, math.inf))
    return _worst(found)


def expert_errors(result: Factors, expected: Optima) -> dict[str, float]:
    found = []
    for i, optimum in expected.items():
        shapes = [tuple(part.shape) for part in result[i]] if i < len(result) else []
        (m, n), r = optimum.M.shape, len(optimum.sigma)
        right = shapes == [(m, r), (r, n)]
        found.append(
            {"excess": optimum.excess(result[i][0].double() @ result[i][1].double()) if right else math.inf}
        )
    return _worst(found)


def _worst(layers: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each error the largest; infinite where one is not a number."""
    finite = [{k: error if error == error else math.inf for k, error in layer.items()} for layer in layers]
    return {name: max(layer[name] for layer in finite) for name in finite[0]}
