"""A case of the kernels' benchmark that takes no time."""

from __future__ import annotations

from dataclasses import replace

import torch

from mingle.bench.gated_experts import floor
from mingle.bench.gated_experts.cases import KernelCase

CPU = torch.device("cpu")
LIMITS = floor.Ceilings({"float32": 1e11, "bfloat16": 2e11, "float16": 1e11}, 1e10)


def tiny(reduce: str = "sample", **changes) -> KernelCase:
    return replace(KernelCase("tiny", 3, 5, 48, 40, 4, rank=16, reduce=reduce), **changes)
