"""How much of a disk a merge will take, estimated from shapes before it begins; rather too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mingle import methods
from mingle.io.base_files import base_files
from mingle.methods.base import MergeMethod, kept_size
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
    kept = fitted.kept_bytes()
    head = kept_size(head_of(fitted.model, fitted.task.heads(fitted.model)).values())
    files = sum(file.stat().st_size for file in base_files(base))
    return Room(files, kept.task + head, 2 * kept.state)
