"""The input directions a task uses, per layer: what later gates must not disturb."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mingle import linalg
from mingle.linalg import InputDirections


@contextmanager
def collected(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, InputDirections]]:
    """While the block runs, collect what every token that a layer sees says of its leading input directions.

    Yields:
        name → `mingle.linalg.InputDirections`, filled as the model runs.  Layers that have always been given
        the very same tensors, as q, k and v are, end up with the very same object.
    """
    seen: dict[str, InputDirections] = {}
    nothing: dict[int, InputDirections] = {}
    last: torch.Tensor | None = None
    # what the last tensor made of each earlier state: layers that shared all inputs so far share this one's
    # cost as well
    results: dict[int, tuple[InputDirections, InputDirections]] = {}

    def hook(name: str) -> Any:
        def collect(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            nonlocal last
            x, mask = args[0], getattr(module, "token_mask", None)
            if last is not x:
                last = x
                results.clear()
            before = seen.get(name) or nothing.setdefault(x.shape[-1], InputDirections(x.shape[-1]))
            if id(before) not in results:
                results[id(before)] = (
                    before,
                    before.including(x if mask is None else x[mask]),
                )  # keeps `before` alive, and with it its id
            seen[name] = results[id(before)][1]

        return collect

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def extend(
    bases: Mapping[str, torch.Tensor], seen: Mapping[str, InputDirections], k: int
) -> dict[str, torch.Tensor]:
    """Every layer's basis with the top-`k` input directions of one more task: [d_in, K] → [d_in, K' ≤ K + k]."""
    leading = {id(directions): directions.top(k) for directions in set(seen.values())}
    return {
        name: linalg.extend_basis(bases[name], leading[id(directions)].to(bases[name]))
        for name, directions in seen.items()
    }


def saturated(bases: Mapping[str, torch.Tensor]) -> Iterable[str]:
    """The layers whose basis fills the whole input space: no later gate can move there under a hard
    constraint.
    """
    return [name for name, basis in bases.items() if basis.shape[1] >= len(basis)]
