"""What products run in on a GPU."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import ARITHMETIC, Arithmetic


@pytest.fixture
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    if request.param == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return ARITHMETIC[request.param]
