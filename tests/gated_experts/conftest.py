"""What products run in on a GPU, and when small layers fold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_cases import ARITHMETIC, Arithmetic

from mingle.ops import dispatch


@pytest.fixture
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    if request.param == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return ARITHMETIC[request.param]


@pytest.fixture(autouse=True, scope="module")
def _folding_by_operations() -> Iterator[None]:
    """Small layers fold on a GPU as large ones do, whose memory weighs less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_TOUCHED", {})
        yield
