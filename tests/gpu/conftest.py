"""Fixtures of all tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import ARITHMETIC, Arithmetic


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield
    matmul.fp32_precision = before


@pytest.fixture
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    if request.param == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return ARITHMETIC[request.param]
