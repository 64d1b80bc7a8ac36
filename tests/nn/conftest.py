"""A network for adapters, an input of it, and an adapter that PEFT saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def base() -> nn.Module:
    from peft_adapters import Net

    return Net().double().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 6, dtype=torch.float64)


@pytest.fixture
def saved(base: nn.Module, tmp_path: Path) -> Path:
    from peft_adapters import adapted

    adapted(base, tmp_path / "adapter")
    return tmp_path / "adapter"
