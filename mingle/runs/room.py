"""How much of a disk a merge will take, estimated from shapes before it begins; rather too much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mingle import methods
from mingle.io.base_files import base_files
from mingle.methods.base import MergeMethod, PlainMethod
from mingle.methods.gated import GatedMethod
from mingle.options import build
from mingle.tasks import TaskType
from mingle.tasks.heads import head_of


@dataclass(frozen=True)
class Room:
    """What a merger's folder holds, in bytes.

    Attributes:
        base: the copy of the base model.
        task: what is kept of each task alone, at most.
        state: what is kept of all tasks together, twice: the old stays until the new is written.
    """

    base: int
    task: int
    state: int


def of_merge(method: str, options: Mapping[str, Any], base: Path, task: TaskType) -> Room:
    """The room for a merge by `method`, with all of its options, into the base model in a folder."""
    chosen, model = methods.get(method), task.skeleton(base)
    tower = model.get_submodule(task.tower(model)).state_dict()
    return of_method(chosen(model, task, tower, build(chosen.Options, options, f"method {method!r}")), base)


def of_method(fitted: MergeMethod, base: Path) -> Room:
    """The room for a merge by a method that was fitted to the base model in a folder, or to its skeleton."""
    kept = state = 0
    if fitted.per_task:
        kept = _bytes(fitted.base.values())
    elif isinstance(fitted, PlainMethod):
        whole = _bytes(fitted.tower.state_dict().values())
        state = whole + whole // 2  # the tower, and in some methods a count for every entry
    elif isinstance(fitted, GatedMethod):
        kept = _expert(fitted)
        if type(fitted).state_tensors is not GatedMethod.state_tensors:
            state = _bytes(fitted.base.values())
    kept += _bytes(head_of(fitted.model, fitted.task.heads(fitted.model)).values())
    return Room(sum(file.stat().st_size for file in base_files(base)), kept, 2 * state)


def _expert(method: GatedMethod) -> int:
    """A, B, gate and basis of every layer."""
    rank, basis = method.options.rank, getattr(method.options, "k", 0)
    size = 0
    for layer in method.layers.values():
        width, height = layer.in_features, layer.out_features
        numbers = min(rank, width, height) * (width + height) + (basis + 1) * width + 1
        size += numbers * _itemsize(layer.weight)
    return size


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * _itemsize(tensor) for tensor in tensors)


def _itemsize(tensor: Tensor) -> int:
    """Of what is kept, which may be wider than the base."""
    return max(tensor.dtype.itemsize, 4)
