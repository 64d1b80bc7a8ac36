"""A small network, and adapters that PEFT saves for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mingle import LowRankExpert

peft = pytest.importorskip("peft")

LAYERS = ["embed", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.norm(self.fc1(x)).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 6)
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.conv(x.mT).mT


def randomize(model: nn.Module, adapter: str = "default", seed: int = 5) -> None:
    """An adapter that does something, as if it were trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and f".{adapter}" in name:
                parameter.copy_(
                    parameter + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                )


def adapted(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """PEFT's model on a copy of `base`, with its adapter saved in `folder`."""
    options = {"target_modules": ["embed", "fc1", "fc2"], "r": 4, "lora_alpha": 6, **options}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def expert(d_out: int, d_in: int, rank: int = 2) -> LowRankExpert:
    return LowRankExpert(A=torch.randn(rank, d_in), B=torch.randn(d_out, rank))
