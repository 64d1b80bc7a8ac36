"""A transformer in plain PyTorch, without a configuration, and a task type for it."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import nn

from mingle.tasks import TaskData, TaskType


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)})
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attention["qkv"](self.norm(x)).chunk(3, -1)
        x = x + self.attention["out"](nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(self.up(x).relu())


class PlainNet(nn.Module):
    """Curves [n, N, 3] → four scores [n, 4]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.classify = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x.mean(1))


class Curves(TaskType):
    name: ClassVar[str] = "curves"

    def logits(self, model: nn.Module, data: TaskData) -> torch.Tensor:
        return model(data.inputs["curve"])

    def run(self, tower: nn.Module, samples: int, device: torch.device) -> None:
        tower(torch.zeros(samples, 5, 3, device=device))


def curves(n: int = 6, *, labelled: bool = False) -> dict[str, torch.Tensor]:
    labels = {"labels": torch.randint(0, 4, (n,))} if labelled else {}
    return {"curve": torch.randn(n, 5, 3), **labels}


def moved(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """A fine-tuned copy."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += scale * torch.randn_like(parameter)
    return tuned
