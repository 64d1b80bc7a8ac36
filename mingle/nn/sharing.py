"""Layers that read one input, as q, k and v or gate and up, computed together at the first of their calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mingle import functional
from mingle.kernels import prepack
from mingle.nn.linear import MingleLinear
from mingle.ops.side_by_side import lay, movable, stacked, together


class SharedInput:
    """Answers for several `MingleLinear` that are called one after the other with the same tensor.

    The first call computes all of them, with one pass over x for all their A and gates; the others collect
    their results.  Where a layer turns out to be called with another tensor than its siblings, as in
    cross-attention, all are computed alone from then on.
    """

    def __init__(self, layers: Sequence[MingleLinear]) -> None:
        self.layers = list(layers)
        self.apart = False
        self._call: tuple[torch.Tensor, torch.Tensor | None, bool] | None = None
        self._waiting: list[torch.Tensor | None] = []
        self._experts: torch.Tensor | None = None  # all A, see `lay`

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_experts": None}

    def forward(self, position: int, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The output of the layer at `position`, or None where it is to be computed alone."""
        if self._call is not None:
            known_x, known_mask, known_grad = self._call
            ready = self._waiting[position]
            if (
                ready is not None
                and known_x is x
                and known_mask is mask
                and known_grad == torch.is_grad_enabled()
            ):
                return self._take(position, ready)
            self.apart = True
            self._call, self._waiting = None, []
        if self.apart or len({(layer.reduce, layer.backend) for layer in self.layers}) > 1:
            return None
        self._pack()
        first = self.layers[0]
        ys = functional.gated_experts_shared(
            x,
            [layer.tensors() for layer in self.layers],
            reduce=first.reduce,
            mask=mask,
            frozen_gates=[layer.frozen_gates for layer in self.layers],
            backend=first.backend,
        )
        self._call, self._waiting = (x, mask, torch.is_grad_enabled()), list(ys)
        return self._take(position, ys[position])

    def _pack(self) -> None:
        """Lay the layers' A side by side in one buffer, so that no shared pass needs to copy them."""
        experts = [layer.A for layer in self.layers]
        if torch.compiler.is_compiling() or len({A.shape[1:] for A in experts}) > 1 or not movable(experts):
            return
        if together(experts) is None:
            self._experts = lay(experts)
        for layer in self.layers:
            layer.keep_packed()
        if all(layer.prepack for layer in self.layers):
            prepack.keep_shrink(stacked(experts), experts)

    def _take(self, position: int, y: torch.Tensor) -> torch.Tensor:
        self._waiting[position] = None
        if all(waiting is None for waiting in self._waiting):
            self._call, self._waiting = None, []
        return y


#: children of one module that transformers call with one tensor: attention's, and gated feed-forward layers'
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)


def share_inputs(model: nn.Module, groups: Iterable[Sequence[str]] | None = None) -> list[tuple[str, ...]]:
    """Let injected layers that read the same tensor share one pass over it.

    Args:
        model: a module with `MingleLinear` layers; see `mingle.inject`.
        groups: names of layers that are children of one module and are called with the same input.  By
            default whichever of `GROUPS` the model has: q, k and v, and gate and up.

    Returns:
        The dotted names of the layers of each group found.

    Raises:
        ValueError: no module has all layers of a group as injected children, or, by default, of any group.
    """
    found: list[tuple[str, ...]] = []
    for names in GROUPS if groups is None else groups:
        before = len(found)
        for prefix, module in model.named_modules():
            layers = [getattr(module, name, None) for name in names]
            members = [layer for layer in layers if isinstance(layer, MingleLinear)]
            if len(members) == len(names) > 1:
                shared = SharedInput(members)
                for position, layer in enumerate(members):
                    layer.shared = (shared, position)
                found.append(tuple(f"{prefix}.{name}".removeprefix(".") for name in names))
        if groups is not None and len(found) == before:
            raise ValueError(f"no module has the injected layers {', '.join(names)} side by side")
    if groups is None and not found:
        known = "; ".join(", ".join(names) for names in GROUPS)
        raise ValueError(f"no module has injected layers of one group side by side; known groups: {known}")
    return found
