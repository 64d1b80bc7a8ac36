"""Whether two contenders have come to the same merge: gates, experts and protected directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    errors = {}
    for name, pair in expected.items():
        own, truth = (torch.cat([w.double(), b.double()[:, None]], 1).cpu() for w, b in (found[name], pair))
        relative = (own - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)
        errors[name] = relative.max().item() if len(truth) else 0.0
    return _verdict(errors, GATES[next(iter(expected.values()))[0].dtype])


def experts(found: Experts, expected: Experts) -> dict[str, Any]:
    """The worst relative error of B A in the layers that `found` has."""
    errors = {}
    for name in found:
        own, truth = (one[name].delta().double() for one in (found, expected))
        errors[name] = ((own - truth).norm() / truth.norm()).item()
    return _verdict(errors, EXPERTS)


def bases(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sine of the largest angle between bases [d_in, K] in any layer; 1 where K differs."""
    errors = {}
    for name, U in expected.items():
        V = found[name]
        errors[name] = torch.linalg.matrix_norm(V - U @ (U.mT @ V), 2).item() if U.shape == V.shape else 1.0
    return _verdict(errors, BASES)


def _verdict(errors: Mapping[str, float], limit: float) -> dict[str, Any]:
    """Of the worst layer; what is not a number is worst."""
    name = max(errors, key=lambda key: errors[key] if math.isfinite(errors[key]) else math.inf)
    worst = errors[name] if math.isfinite(errors[name]) else None
    return {"error": worst, "tolerance": limit, "layer": name, "ok": worst is not None and worst <= limit}
