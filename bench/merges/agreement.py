"""Whether two contenders have come to the same merge: gates, experts and protected directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mingle.nn.low_rank_expert import LowRankExpert

#: by layer the weights and biases of all gates, side by side [T, d_in + 1]
Gates = Mapping[str, Tensor]
Experts = Mapping[str, LowRankExpert]

#: relative error of a task's gates in any layer, in fp32 and in fp64
GATES = {torch.float32: 1e-4, torch.float64: 1e-6}
#: relative error of B A, and sine of the largest angle between bases, in any layer in fp32
EXPERTS, BASES = 1e-4, 1e-3


def gates(found: Gates, expected: Gates) -> dict[str, Any]:
    """The worst relative error of one task's gate in one layer, weight and bias together, and where it is."""
    limit = GATES[next(iter(expected.values())).dtype]
    return _worst({layer: _error(found[layer], truth) for layer, truth in expected.items()}, limit)


def experts(found: Experts, expected: Experts) -> dict[str, Any]:
    """The worst relative error of B A in the layers that `found` has."""
    pairs = {layer: (own.delta(), expected[layer].delta()) for layer, own in found.items()}
    return _worst({layer: _error(*map(torch.ravel, pair)) for layer, pair in pairs.items()}, EXPERTS)


def _error(found: Tensor, truth: Tensor) -> float:
    """The worst relative error of a row."""
    found, truth = found.double().cpu(), truth.double().cpu()
    return ((found - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-30)).max().item()


def bases(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sine of the largest angle between bases [d_in, K] in any layer; 1 where K differs."""

    def error(layer: str) -> float:
        V, U = (one[layer].double().cpu() for one in (found, expected))
        return torch.linalg.matrix_norm(V - U @ (U.mT @ V), 2).item() if U.shape == V.shape else 1.0

    return _worst({layer: error(layer) for layer in expected}, BASES)


def _worst(errors: Mapping[str, float], limit: float) -> dict[str, Any]:
    """The error of the worst layer; what is not a number is worst."""
    layer = max(errors, key=lambda key: errors[key] if math.isfinite(errors[key]) else math.inf)
    worst = errors[layer] if math.isfinite(errors[layer]) else None
    return {"error": worst, "tolerance": limit, "layer": layer, "ok": worst is not None and worst <= limit}
