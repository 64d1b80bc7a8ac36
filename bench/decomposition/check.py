"""Correctness before speed: decompositions and experts against float64 LAPACK."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mingle.bench.decomposition.cases import Problem
from mingle.bench.decomposition.peers import Triplets
from mingle.bench.decomposition.pipelines import Factors, effective_rank
from mingle.methods.experts import concatenated

# Beside the excess residual: max |UᵀU − I|, and of V, which LAPACK's fp32 keeps for 14336 rows, and the
# largest singular value, which every sketch finds.  Of our orthogonality the specification asks for more.
_LIMITS = {"orthogonality": 2e-5, "leading value": 1e-2}
_OUR_LIMITS = _LIMITS | {"orthogonality": 2e-6}
#: a shorter side up to which singular values are LAPACK's own; beyond, the square roots of the Gram matrix's
#: eigenvalues, ten times as fast
_DIRECT = 1100


@dataclass(frozen=True)
class Optimum:
    """The best a rank allows for M [m, n]: the residual ‖M − M_r‖, and the leading singular values σ [r]; all
    in float64.
    """

    M: Tensor
    residual: float
    sigma: Tensor

    @classmethod
    def of(cls, M: Tensor, r: int) -> Optimum:
        M = M.double()
        shorter = min(M.shape)
        if shorter <= _DIRECT:
            squares = torch.linalg.svdvals(M).square()
        else:
            rows = M if M.shape[0] == shorter else M.mT
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
        return {
            "excess": self.excess(U * S @ Vh),
            "orthogonality": off,
            "leading value": float(values[0]),
            "values": float(values.max()),
        }


def optima(problem: Problem) -> dict[int, Optimum]:
    """Of the first and the last layer."""
    return {i: Optimum.of(problem.deltas[i], problem.rank) for i in sorted({0, problem.layers - 1})}


def projected_optima(problem: Problem) -> tuple[dict[int, Optimum], dict[int, int]]:
    """The same for Δ without the leading block of the earlier updates, found by LAPACK's QR and SVD in
    float64; and that block's size.
    """
    found, ranks = {}, {}
    for i in sorted({0, problem.layers - 1}):
        B, A = (part.double() for part in concatenated(problem.earlier[i]))
        (left, upper), (right, lower) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
        U, S, Vh = torch.linalg.svd(upper @ lower.mT)
        ranks[i] = effective_rank(S)
        U, V = left @ U[:, : ranks[i]], right @ Vh[: ranks[i]].mT
        delta = problem.deltas[i].double()
        found[i] = Optimum.of(delta - U @ (U.mT @ delta @ V) @ V.mT, problem.rank)
    return found, ranks


def decomposition_errors(result: Triplets, expected: dict[int, Optimum], r: int) -> dict[str, float]:
    """The worst of the layers that were looked at; infinite where a shape is wrong or an entry is not finite."""
    U, S, Vh = result

    def errors(i: int, optimum: Optimum) -> dict[str, float]:
        m, n = optimum.M.shape
        if i >= len(U) or (U[i].shape, S[i].shape, Vh[i].shape) != ((m, r), (r,), (r, n)):
            return dict.fromkeys(("excess", *_LIMITS, "values"), math.inf)
        return optimum.errors(U[i], S[i], Vh[i])

    return _worst([errors(i, optimum) for i, optimum in expected.items()])


def expert_errors(result: Factors, expected: dict[int, Optimum]) -> dict[str, float]:
    def excess(i: int, optimum: Optimum) -> float:
        B, A = result[i]
        if (len(B), A.shape[1]) != optimum.M.shape or B.shape[1] != len(optimum.sigma):
            return math.inf
        return optimum.excess(B.double() @ A.double())

    return _worst(
        [{"excess": excess(i, optimum) if i < len(result) else math.inf} for i, optimum in expected.items()]
    )


def verdict(errors: dict[str, float], limit: float, ours: bool) -> dict[str, Any]:
    """``status`` and ``errors`` of one result, and where it is wrong the ``reason``; `limit` bounds the
    excess residual on both sides.
    """
    limits = {"excess": limit, **(_OUR_LIMITS if ours else _LIMITS)}
    wrong = {
        name: error
        for name, error in errors.items()
        if name in limits and not -limits[name] <= error <= limits[name]
    }
    finite = {
        name: error if error < math.inf else None for name, error in errors.items()
    }  # JSON knows no infinity
    if not wrong:
        return {"status": "ok", "errors": finite, "limit": limit}
    reason = "; ".join(f"{name} {error:.1e}, allowed {limits[name]:.1e}" for name, error in wrong.items())
    return {"status": "wrong", "errors": finite, "limit": limit, "reason": reason}


def _worst(layers: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each error the largest; infinite where one is not a number."""
    return {
        name: max(layer[name] if layer[name] == layer[name] else math.inf for layer in layers)
        for name in layers[0]
    }
