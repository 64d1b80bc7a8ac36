"""NUFILT's training as it was published: layer by layer, every product computed anew at each step, autograd
and Adam over all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Layer(NamedTuple):
    """Δ and M [m, d], V_old [d, r_p], V_new [d, r_v] and the initial A [r_l, d] of one layer."""

    delta: Tensor
    merged: Tensor
    old: Tensor
    new: Tensor
    start: Tensor


class FilterLora(nn.Module):
    """A and B of one layer; calling it gives its part of the loss."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(layer.start.clone())
        self.B = nn.Parameter(torch.zeros_like(layer.start.mT).contiguous())

    def forward(self) -> Tensor:
        """‖ΔV_new − (M + Δ(P + BA))V_new‖² + ‖MV_old − (M + Δ(P + BA))V_old‖²."""
        delta, merged, old, new, _ = self.layer
        return sum(
            (
                (target @ V - merged @ V - delta @ (V - old @ (old.mT @ V)) - delta @ (self.B @ (self.A @ V)))
                .square()
                .sum()
                for target, V in ((delta, new), (merged, old))
            ),
            start=delta.new_zeros(()),
        )


def train(layers: Sequence[Layer], steps: int, lr: float) -> list[tuple[Tensor, Tensor]]:
    """A and B of every layer after `steps` of Adam on the sum of their losses."""
    modules = [FilterLora(layer) for layer in layers]
    optimizer = torch.optim.Adam([p for module in modules for p in module.parameters()], lr=lr)
    for _ in range(steps):
        torch.stack([module() for module in modules]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [(module.A.detach(), module.B.detach()) for module in modules]
