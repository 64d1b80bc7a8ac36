"""The input directions a task uses, per layer: what later gates must not disturb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from mingle import linalg
from mingle.linalg import InputDirections
from mingle.nn.observe import observed

_SHOWN = 5


@contextmanager
def collected(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, InputDirections]]:
    """While the block runs, collect the input directions of every layer from all tokens that it sees.

    Yields:
        name → `mingle.linalg.InputDirections`, filled as the model runs.  Layers that have only been given
        the very same tensors, as q, k and v are, end up with the very same object.
    """
    seen: dict[str, InputDirections] = {}
    nothing: dict[int, InputDirections] = {}
    last: torch.Tensor | None = None
    # Each earlier state, by its id, with what the last tensor made of it: layers that shared all inputs so
    # far share the cost of this one too.  Keeping the earlier state alive keeps its id its own.
    results: dict[int, tuple[InputDirections, InputDirections]] = {}

    def collect(name: str, layer: nn.Module, x: torch.Tensor) -> None:
        nonlocal last
        mask = getattr(layer, "token_mask", None)
        if last is not x:
            last = x
            results.clear()
        before = seen.get(name) or nothing.setdefault(x.shape[-1], InputDirections(x.shape[-1]))
        if id(before) not in results:
            results[id(before)] = before, before.including(x if mask is None else x[mask])
        seen[name] = results[id(before)][1]

    with observed(layers, collect):
        yield seen


def extend(
    bases: Mapping[str, torch.Tensor], seen: Mapping[str, InputDirections], k: int
) -> dict[str, torch.Tensor]:
    """Every layer's basis [d_in, K] with a task's top-`k` input directions: [d_in, K'], K' ≤ K + k."""
    leading = {id(directions): directions.top(k) for directions in set(seen.values())}
    return {
        name: linalg.extend_basis(bases[name], leading[id(directions)].to(bases[name]))
        for name, directions in seen.items()
    }


def crowded(bases: Mapping[str, torch.Tensor], k: int) -> str:
    """Which layers' bases have no room for `k` more directions, in words; empty where there are none.

    Where none remains, later gates cannot move under a hard constraint.
    """
    left = {name: (len(basis) - basis.shape[1], len(basis)) for name, basis in bases.items()}
    full = [f"{name} ({free} of {width} left)" for name, (free, width) in left.items() if free < k]
    more = f" and {len(full) - _SHOWN} more" if len(full) > _SHOWN else ""
    return f"few input directions are left to later tasks in {', '.join(full[:_SHOWN])}{more}" if full else ""
