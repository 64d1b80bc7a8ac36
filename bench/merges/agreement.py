"""Whether two contenders have come to the same merge: gates, experts and protected directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mingle.nn.linear import LowRankExpert

#: by layer the weights [T, d_in] and biases [T] of all gates
Gates = Mapping[str, tuple[Tensor, Tensor]]
Experts = Mapping[str, LowRankExpert]

#: relative error of a task's gates in any layer, in fp32 and in fp64
GATES = {torch.float32: 1e-4, torch.float64: 1e-6}
#: relative error of B A, and sine of the largest angle between bases, in any layer in fp32
EXPERTS, BASES = 1e-4, 1e-3


def gates(found: Gates, expected: Gates) -> dict[str, Any]:
    """The worst relative error of one task's gate in one layer, weight and bias together, and where it is."""

    def error(layer: str) -> float:
        pairs = found[layer], expected[layer]
        own, truth = (torch.cat([w.double(), b.double()[:, None]], 1).cpu() for w, b in pairs)
        return ((own - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)).max().item()

    return _worst(expected, error, GATES[next(iter(expected.values()))[0].dtype])


def experts(found: Experts, expected: Experts) -> dict[str, Any]:
    """The worst relative error of B A in the layers that `found` has."""

    def error(layer: str) -> float:
        own, truth = (one[layer].delta().double() for one in (found, expected))
        return ((own - truth).norm() / truth.norm()).item()

    return _worst(found, error, EXPERTS)


def bases(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sine of the largest angle between bases [d_in, K] in any layer; 1 where K differs."""

    def error(layer: str) -> float:
        V, U = (one[layer].double().cpu() for one in (found, expected))
        return torch.linalg.matrix_norm(V - U @ (U.mT @ V), 2).item() if U.shape == V.shape else 1.0

    return _worst(expected, error, BASES)


def _worst(layers: Iterable[str], error: Callable[[str], float], limit: float) -> dict[str, Any]:
    """The error of the worst layer; what is not a number is worst."""
    errors = {layer: error(layer) for layer in layers}
    layer = max(errors, key=lambda key: errors[key] if math.isfinite(errors[key]) else math.inf)
    worst = errors[layer] if math.isfinite(errors[layer]) else None
    return {"error": worst, "tolerance": limit, "layer": layer, "ok": worst is not None and worst <= limit}
