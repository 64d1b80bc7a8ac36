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
        state: what is kept of all tasks together.
        rewritten: whether each arrival writes what is kept of every task again.
    """

    base: int
    task: int
    state: int
    rewritten: bool = False

    def saved_once(self, tasks: int) -> int:
        """For a merge of that many tasks that is saved when it is done, without the base."""
        return self.task * tasks + self.state

    def saved_each(self, tasks: int, before: int = 0, keep: int | None = None) -> int:
        """For that many tasks that are merged and saved one after another, without the base.

        Every save is a generation, and an old one goes only when the next is there.

        Args:
            tasks: how many arrive.
            before: how many are merged already.
            keep: how many generations are kept; None for all.
        """
        at_once = generations(tasks, keep)
        merged = range(before + 1, before + tasks + 1)[tasks - at_once :]
        return self.state * at_once + self.task * (sum(merged) if self.rewritten else tasks)


#: what Python takes with PyTorch and transformers
_LIBRARIES = 600_000_000


def in_memory(fitted: MergeMethod, size: Room, tasks: int, processes: int | None = None) -> dict[str, int]:
    """What a merge in memory has there all the time, in bytes, by the parts that it is made of.

    Args:
        fitted: the method, fitted to the base or to its skeleton.
        size: see `of_method`.
        tasks: how many there will be.
        processes: how many share out the weights of models, the rest of which stays in files; that of each,
            rather too little.  None for one that has whole models, of whichever number.
    """
    whole, kept = sum(t.nbytes for t in fitted.model.state_dict().values()), size.task * tasks + size.state
    if processes is not None:
        own = whole // processes
        models = {"merged model": own, "its teacher": own}
        return models | {"what is kept of tasks": kept // processes, "libraries": _LIBRARIES}
    return {
        "base": whole,
        "merged model": whole,
        "fine-tuned model": whole,
        **({"its teacher": whole} if fitted.needs_seeds else {}),
        "what is kept of tasks": kept,
        "libraries": _LIBRARIES,
    }


def generations(tasks: int, keep: int | None) -> int:
    """How many are there at once, of that many tasks that arrive where `keep` are kept; None for all."""
    return tasks if keep is None else min(tasks, keep + 1)


def of_merge(method: str, options: Mapping[str, Any], base: Path, task: TaskType) -> Room:
    """The room for a merge by `method`, with all of its options, into the base model in a folder."""
    return of_method(fitted_to(method, options, base, task), base)


def fitted_to(method: str, options: Mapping[str, Any], base: Path, task: TaskType) -> MergeMethod:
    """A method fitted to the skeleton of the base model in a folder."""
    chosen, model = methods.get(method), task.skeleton(base)
    tower = model.get_submodule(task.tower(model)).state_dict()
    return chosen(model, task, tower, build(chosen.Options, options, f"method {method!r}"))


def of_method(fitted: MergeMethod, base: Path) -> Room:
    """The room for a merge by a method that was fitted to the base model in a folder, or to its skeleton."""
    kept = fitted.kept_bytes()
    head = kept_size(head_of(fitted.model, fitted.task.heads(fitted.model)).values())
    files = sum(file.stat().st_size for file in base_files(base))
    return Room(files, kept.task + head, kept.state, fitted.rewrites_tasks())
