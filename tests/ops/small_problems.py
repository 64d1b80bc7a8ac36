"""A call that is small enough to fold."""

from __future__ import annotations

import torch


def problem(*leading: int) -> dict[str, torch.Tensor]:
    """Eight inputs and outputs, so that folding pays for five tokens and more."""
    sizes = dict(weight=(8, 8), bias=(8,), A=(3, 2, 8), B=(3, 8, 2), gate_weight=(3, 8), gate_bias=(3,))
    return {
        name: torch.randn(*size, dtype=torch.float64)
        for name, size in (sizes | dict(x=(*leading, 8))).items()
    }
