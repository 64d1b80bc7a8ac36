"""The input directions a task uses, per layer: what later gates must not disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from mingle import linalg, ranks
from mingle.io.lazy_tensors import consecutive
from mingle.linalg import InputDirections
from mingle.nn.linear import MingleLinear
from mingle.nn.observe import observed

#: bytes that are kept of layers in one pass of the samples; where all would take more, there are several
BUDGET = 2**29
_SHOWN = 5


def extended(
    bases: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module], run: Callable[[], object], k: int
) -> dict[str, torch.Tensor]:
    """Every layer's basis [d_in, K] with the top-`k` input directions of a task: [d_in, K'], K' ≤ K + k.

    Args:
        bases: by name of a layer.
        layers: by name, in about the order in which they work.
        run: passes the task's samples through the model; called once, or for some layers after others.
        k: how many.
    """
    sizes = {name: InputDirections.most_bytes(basis.shape[0]) for name, basis in bases.items()}
    found: dict[str, torch.Tensor] = {}  # in the order in which layers work
    for names in consecutive(sizes, BUDGET):
        some = {name: layers[name] for name in names}
        with collected(some) as seen:
            run()
        found |= with_leading(bases, of_all(some, seen), k)
    return found | {name: basis for name, basis in bases.items() if name not in found}


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
        mask = layer.counted(x) if isinstance(layer, MingleLinear) else None
        if last is not x:
            last = x
            results.clear()
        before = seen.get(name) or nothing.setdefault(x.shape[-1], InputDirections(x.shape[-1]))
        if id(before) not in results:
            results[id(before)] = before, before.including(x if mask is None else x[mask])
        seen[name] = results[id(before)][1]

    with observed(layers, collect):
        yield seen


def of_all(
    layers: Mapping[str, nn.Module], seen: Mapping[str, InputDirections]
) -> dict[str, InputDirections]:
    """The input directions of what all processes have seen, the same in each; see `mingle.ranks`.

    Args:
        layers: by name, the same in every process.
        seen: by name of a layer, what this process has `collected`.

    Returns:
        The same for every layer that any process has seen at work.  Layers that shared all inputs in every
        process still share one object.
    """
    numbers = {id(directions): number for number, directions in enumerate(seen.values())}
    found = ranks.gather({name: _Known(numbers[id(own)], own.width, own.count) for name, own in seen.items()})
    sharing: dict[tuple[_Known | None, ...], list[str]] = {}
    for name in dict.fromkeys(name for each in found for name in each):
        known = tuple(each.get(name) for each in found)
        sharing.setdefault(known, []).append(name)
    result: dict[str, InputDirections] = {}
    for known, names in sharing.items():
        own = seen.get(names[0]) or InputDirections(max(each.width for each in known if each))
        device = next(layers[names[0]].parameters()).device
        count = sum(each.vectors for each in known if each)
        result |= dict.fromkeys(names, own.of_all(count, device))
    return result


class _Known(NamedTuple):
    """What one process has collected of a layer: the number of the object, its width and how many vectors."""

    number: int
    width: int
    vectors: int


def with_leading(
    bases: Mapping[str, torch.Tensor], seen: Mapping[str, InputDirections], k: int
) -> dict[str, torch.Tensor]:
    """Every layer's basis [d_in, K] with a task's top-`k` input directions: [d_in, K'], K' ≤ K + k.

    Each of several processes finds those of some layers, and tells the others; so all have the same.

    Args:
        bases: by name of a layer.
        seen: the same in every process, see `of_all`.
        k: how many.
    """
    distinct = list({id(directions): directions for directions in seen.values()}.values())
    mine = ranks.dealt([directions.width**3 for directions in distinct])[ranks.rank()]
    found = ranks.gather({number: distinct[number].top(k).cpu() for number in mine})
    leading = {id(distinct[number]): top for each in found for number, top in each.items()}
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
