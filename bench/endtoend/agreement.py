"""Whether two contenders have come to the same merge: gates, experts and protected directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mingle.bench.endtoend.contenders import Experts, Gates

#: relative error of a task's gates in any layer, in fp32 and in fp64
GATES = {torch.float32: 1e-4, torch.float64: 1e-6}
#: relative error of B A, and sine of the largest angle between bases, in any layer in fp32
EXPERTS, BASES = 1e-4, 1e-3


def gates(found: Gates, expected: Gates) -> dict[str, Any]:
    """The worst relative error of one task's gate in one layer, weight and bias together, and where it is."""
    worst, where = 0.0, ""
    for name, (weight, bias) in expected.items():
        own = [
            torch.cat([w.double(), b.double()[:, None]], 1).cpu() for w, b in ((weight, bias), found[name])
        ]
        error = (
            ((own[1] - own[0]).norm(dim=1) / own[0].norm(dim=1).clamp_min(1e-30)).max().item()
            if len(own[0])
            else 0.0
        )
        if not error <= worst:  # NaN is worst
            worst, where = error, name
    limit = GATES[next(iter(expected.values()))[0].dtype]
    return {
        "error": worst if math.isfinite(worst) else None,
        "tolerance": limit,
        "layer": where,
        "ok": worst <= limit,
    }


def experts(found: Experts, expected: Experts) -> dict[str, Any]:
    """The worst relative error of B A in the layers that `found` has."""
    errors = {
        name: _relative((B @ A).double(), expected[name].delta().double()) for name, (A, B) in found.items()
    }
    return _verdict(errors, EXPERTS)


def bases(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sine of the largest angle between protected directions [d_in, K] in any layer; 1 where their
    numbers differ.
    """
    errors = {}
    for name, U in expected.items():
        V = found[name]
        errors[name] = torch.linalg.matrix_norm(V - U @ (U.mT @ V), 2).item() if U.shape == V.shape else 1.0
    return _verdict(errors, BASES)


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _verdict(errors: Mapping[str, float], limit: float) -> dict[str, Any]:
    name = max(errors, key=lambda key: errors[key] if math.isfinite(errors[key]) else math.inf)
    worst = errors[name]
    return {
        "error": worst if math.isfinite(worst) else None,
        "tolerance": limit,
        "layer": name,
        "ok": worst <= limit,
    }
