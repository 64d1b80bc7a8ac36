"""What a merger writes of itself, and a merger made of it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mingle import tasks
from mingle.io import merger_folder
from mingle.io.files import CheckpointError
from mingle.merging.merged_task import MergedTask
from mingle.methods.base import Tensors
from mingle.tasks import TaskType
from mingle.tasks.loading import absent
from mingle.tasks.names import in_files

if TYPE_CHECKING:
    from mingle.merging.merger import Merger


def described(merger: Merger) -> dict[str, Any]:
    """What a saved merge says of itself, in the form of `mingle.io.manifest.MERGE`."""
    return {
        "method": merger.method.name,
        "task_type": merger.task.name,
        "seed": merger.seed,
        "dtype": str(next(merger.base.parameters()).dtype).removeprefix("torch."),
        "options": asdict(merger.options),
        **({} if merger.vocabulary == "same" else {"vocabulary": merger.vocabulary}),
        "tasks": [task.noted() for task in merger.merged],
        "matrix": merger.matrix,
        "unknown": merger.unknown,
    }


def kept(merger: Merger) -> list[Tensors]:
    """All that is kept of each task alone: what the method keeps, and what the task has of its own."""
    return [merger.method.task_tensors(i) | task.kept() for i, task in enumerate(merger.merged)]


def base_model(merger: Merger) -> merger_folder.BaseModel:
    """The base, to be written beside what is merged.

    Raises:
        CheckpointError: a module that does not know how it is described.
    """
    if merger.base_folder is not None:
        return merger_folder.BaseModel(merger.base_folder)
    files = merger.task.files(merger.base)
    if not files:
        raise CheckpointError(
            f"the base {type(merger.base).__name__} has no config to save it with; use include_base=False "
            "and give the base to from_pretrained"
        )
    lacking = absent(merger.base)
    held = {name: tensor for name, tensor in merger.base.state_dict().items() if name not in lacking}
    return merger_folder.BaseModel(None, files, partial(in_files, merger.base, held))


def begun(
    merger_class: type[Merger],
    merge: Mapping[str, Any],
    base: nn.Module | str | Path,
    task_type: TaskType | None,
    device: str | torch.device | None,
    path: Path,
) -> Merger:
    """The merger that a file describes, without the tensors of its tasks.

    Args:
        merger_class: `mingle.Merger`, or a class derived from it.
        merge: what `described` gave.
        base, task_type, device: see `mingle.Merger.from_pretrained`.
        path: of the file, for messages.

    Raises:
        CheckpointError: a broken base, or options that do not suit it.
    """
    task, model = task_type or tasks.get(merge["task_type"]), base
    if not isinstance(model, nn.Module):
        model = task.load(model).to(getattr(torch, merge["dtype"]))
    try:
        merger = merger_class(
            model,
            merge["method"],
            task,
            seed=merge["seed"],
            device=device,
            vocabulary=merge.get("vocabulary", "same"),
            **merge["options"],
        )
    except ValueError as error:  # options that do not suit this model
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(base, nn.Module):
        merger.note_base(base)
    merger.merged = [MergedTask.of(noted) for noted in merge["tasks"]]
    merger.matrix = merge["matrix"]
    merger.unknown = merge.get("unknown", [[None] * len(row) for row in merger.matrix])
    return merger


def restore(merger: Merger, saved: list[Tensors], state: Tensors, folder: Path) -> None:
    """Let a merger that has begun take on what `kept` gave of each task, and the state of its method.

    Raises:
        CheckpointError: tensors that belong to something else.
    """
    place = next(merger.base.parameters()).device
    moved = [{name: tensor.to(place) for name, tensor in tensors.items()} for tensors in saved]
    try:
        own = [
            task.take(tensors, merger.task, merger.base)
            for task, tensors in zip(merger.merged, moved, strict=True)
        ]
        merger.method.restore(own, {name: tensor.to(place) for name, tensor in state.items()})
        for number, tensors in enumerate(own):
            if left := sorted(tensors.keys() - merger.method.task_tensors(number).keys()):
                raise ValueError(f"there is no place for {left[0]!r}")
        if merger.merged:
            merger.put_head(-1)
    # what names, numbers and shapes of tensors that belong to something else lead to
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = f"the tensors do not fit the method {merger.method.name!r} with these options"
        raise CheckpointError(f"{folder}: {reason}: {error}") from error
