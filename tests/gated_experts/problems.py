"""One call of `gated_experts` as data: what property tests on the CPU and tests on a GPU have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mingle.functional import gated_experts


class Problem(NamedTuple):
    """The arguments of one call: `tensors` by name, those that need gradients, and the gradient of y."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    needs: list[str]
    upstream: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return self._replace(
            tensors={name: change(tensor) for name, tensor in self.tensors.items()},
            upstream=change(self.upstream),
        )

    def solve(self, backend: str) -> dict[str, Tensor]:
        """y and the gradients."""
        leaves = {
            name: tensor.detach().requires_grad_(name in self.needs) for name, tensor in self.tensors.items()
        }
        y = gated_experts(
            **({"gate_weight": None, "gate_bias": None} | leaves), **self.options, backend=backend
        )
        gradients = (
            torch.autograd.grad(y, [leaves[name] for name in self.needs], self.upstream) if self.needs else ()
        )
        return {"y": y.detach(), **dict(zip(self.needs, gradients, strict=True))}

    def exact(self) -> dict[str, Tensor]:
        """What the formula gives in float64, with the gradients of frozen gates at 0."""
        values = self.mapped(Tensor.double).solve("eager")
        for name, dim in (("gate_weight", 0), ("gate_bias", 0), ("gates", -1)):
            if name in values and self.options.get("frozen_gates"):
                values[name].narrow(dim, 0, self.options["frozen_gates"]).zero_()
        return values

    def sizes(self) -> dict[str, float]:
        """The norms of the same sums with all terms counted positive."""
        values = self.mapped(lambda tensor: tensor.double().abs()).exact()
        return {name: float(value.norm()) for name, value in values.items()}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """`tensor` with other strides; whatever lies between its elements is NaN.  Expanded: its first entry
    throughout.
    """
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "samples last" and tensor.dim() > 2:
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)[..., 1::2]
        return wide.copy_(tensor)
    if layout == "guarded":
        *outer, rows, columns = tensor.shape
        wide = tensor.new_full((*outer, rows + 2, columns + 3), math.nan)[..., 1:-1, 1:-2]
        return wide.copy_(tensor)
    return tensor
