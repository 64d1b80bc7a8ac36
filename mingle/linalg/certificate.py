"""Certificates: how far a decomposition is from the optimal one, and what is done where that is too far."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mingle.linalg.basis import ORTHONORMAL, defect
from mingle.linalg.subspace_iteration import Found, Iteration, full, leading

logger = logging.getLogger(__name__)

#: Of ‖M‖²: what is left of it below this is a rounding error.
_ROUNDING = 1e-12
#: An exact decomposition costs as much as one round for so many columns.
_ROUNDS_PER_COLUMN = 24


class Tolerance(NamedTuple):
    """What a result may be short of the optimal one: see `Certificate`."""

    deficit: float
    excess: float


class Certificate(NamedTuple):
    """How far a decomposition is from the optimal one of its rank, as its own residuals tell.

    With the distance to the ℓ-th singular value, the last one that iterates along, a residual says how much a
    σ_i² may still grow: by 2 ρ_i σ_i, and by no more than 2 ρ_i² σ_i² / (σ_i² − σ_ℓ²) to second order.

    Attributes:
        residuals: ρ_i = ‖M v_i − σ_i u_i‖ [..., r], or ‖Mᵀ u_i − σ_i v_i‖ where M is wide, in M's units; the
            other side vanishes.  0 where the decomposition is exact.
        deficit: [...], by which share Σ σ_i² may be short of the optimum.
        excess: [...], by which share ‖M − U S Vh‖ may exceed the optimum; 0 where it is a rounding error.
    """

    residuals: Tensor
    deficit: Tensor
    excess: Tensor


def shares_of(found: Found, M: Tensor) -> tuple[Tensor, Tensor]:
    """The deficit and the excess of a `Certificate`, of one matrix or of each in a batch."""
    S, residuals, beyond = found.S, found.residuals, found.beyond.unsqueeze(-1)
    # below this a residual is the rounding of an iteration in fp32
    residuals = torch.where(residuals > 4 * torch.finfo(torch.float32).eps * S[..., :1], residuals, 0.0)
    growth = residuals * S
    gap = (S**2 - beyond**2).clamp_min(torch.finfo(S.dtype).tiny)
    lost = torch.minimum(2 * growth, 2 * growth * (growth / gap)).sum(-1)
    captured, whole = (S**2).sum(-1), torch.linalg.matrix_norm(M) ** 2
    left = whole - captured
    return lost / captured.clamp_min(torch.finfo(S.dtype).tiny), torch.where(
        left > _ROUNDING * whole, lost / (2 * left), 0.0
    )


def mend(
    found: Found,
    shares: tuple[Tensor, Tensor],
    scaled: Tensor,
    M: Tensor,
    plan: Iteration,
    wanted: Tolerance,
    keys: list[str],
) -> None:
    """Improve `found` and its `shares` in place for the matrices whose shares are larger than is wanted.

    Where the iteration did not end in orthonormal vectors at all, LAPACK's result takes its place.
    """
    orthonormal = (defect(found.U.mT) <= ORTHONORMAL) & (defect(found.Vh) <= ORTHONORMAL)
    trust = orthonormal & found.S.isfinite().all(-1)
    short = torch.stack([share / most for share, most in zip(shares, wanted, strict=True)]).amax(0)
    for i in (~(trust & (short <= 1))).nonzero().flatten().tolist():
        name, shape = keys[i] or i, list(M.shape[1:])
        if trust[i]:
            better = _better(
                scaled[i], M[i], plan, wanted, keys[i : i + 1], _needed(found, i, float(short[i]))
            )
        else:
            logger.warning(
                "the subspace iteration failed for matrix %r %s; decomposed fully instead", name, shape
            )
            better = full(M[i], plan.rank)
        for part, own in zip((*found, *shares), (*better, *shares_of(better, M[i])), strict=True):
            part[i] = own


def _needed(found: Found, i: int, short: float) -> float:
    """The rounds that bring what matrix i lacks, `short` times what it may, to half of that."""
    closeness = float(found.beyond[i] / found.S[i, -1].clamp_min(torch.finfo(found.S.dtype).tiny))
    return math.log(2 * short) / (-4 * math.log(closeness)) if 0 < closeness < 1 else math.inf


def _better(
    scaled: Tensor, M: Tensor, plan: Iteration, wanted: Tolerance, keys: list[str], needed: float
) -> Found:
    """One matrix again: with as many more rounds as are `needed`, or exactly where that costs less."""
    name, shape = keys[0] or "without a key", list(M.shape)
    if needed <= min(shape) / _ROUNDS_PER_COLUMN:
        longer = replace(plan, power_iters=plan.power_iters + math.ceil(needed))
        logger.debug(
            "matrix %s %s: %d rounds instead of %d", name, shape, longer.power_iters, plan.power_iters
        )
        found = leading(scaled, M, longer, keys)
        if all(float(share) <= most for share, most in zip(shares_of(found, M), wanted, strict=True)):
            return found
    logger.debug("matrix %s %s: singular values too close for rounds; decomposed exactly", name, shape)
    return leading(scaled, M, replace(plan, block=min(shape)), keys)
