"""The relaxed projector as plain, eager PyTorch: the specification in code, and the oracle."""

from __future__ import annotations

import torch


def relaxed_projection(
    gradient: torch.Tensor, basis: torch.Tensor, interference: torch.Tensor, gamma: float, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of the null-space constraint with adaptive relaxation (Eqs. 8–11).

    gradient G [n, d_in], orthonormal basis U [d_in, K], interference S [K] → (projected G, new S, λ [K]):

        r_p = mean_n |G u_p| / (‖G_n‖ + 1e-12),  S ← β S + (1−β) r,  λ = exp(−γ S),  G ← G − (G U) diag(λ) Uᵀ
    """
    along = gradient @ basis
    ratio = (along.abs() / (gradient.norm(dim=1, keepdim=True) + 1e-12)).mean(0)
    interference = beta * interference + (1 - beta) * ratio
    strength = torch.exp(-gamma * interference)
    return gradient - (along * strength) @ basis.mT, interference, strength
