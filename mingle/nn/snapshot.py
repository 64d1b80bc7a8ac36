"""Layers as they were before experts were added to them, to be put back if the merge fails."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mingle.nn.linear import MingleLinear


class Snapshot(NamedTuple):
    """A layer as it was at some time.

    Experts are not kept where from then on they are only added to: longer stacks are copies, and with the old
    ones the experts of all layers would be in memory twice.

    Attributes:
        parameters: by name.
        experts: how many there were.
        rank: of the largest.
    """

    parameters: dict[str, nn.Parameter]
    experts: int
    rank: int

    @classmethod
    def of(cls, layer: MingleLinear, *, whole: bool) -> Snapshot:
        """The layer as it is now; `whole`, with its experts."""
        parameters = dict(layer.named_parameters(recurse=False))
        if not whole:
            del parameters["A"], parameters["B_transposed"]
        return cls(parameters, layer.num_experts, layer.rank)

    def put_back(self, layer: MingleLinear) -> None:
        """Make the layer what it was."""
        for name in {"A", "B_transposed"} - self.parameters.keys():
            older = getattr(layer, name).detach()[: self.experts, : self.rank].clone()
            setattr(layer, name, nn.Parameter(older, requires_grad=False))
        for name, parameter in self.parameters.items():
            setattr(layer, name, parameter)
