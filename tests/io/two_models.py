"""An old and a new model of a few tensors, as files."""

from __future__ import annotations

from pathlib import Path

import torch

from mingle.io.safetensors import CheckpointReader


def model(value: float, names: str = "abcd") -> dict[str, torch.Tensor]:
    return {name: torch.full((3, 5), value) for name in names}


def assert_model(path: Path, value: float) -> None:
    for tensor in CheckpointReader(path).state_dict().values():
        assert torch.equal(tensor, torch.full((3, 5), value))
