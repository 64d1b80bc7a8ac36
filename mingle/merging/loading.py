"""A merged model alone, ready for inference, from a folder or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle import tasks
from mingle.io import adapters_folder, hub, hub_merge
from mingle.io.files import CheckpointError
from mingle.io.hub import ModelName
from mingle.io.manifest import MANIFEST
from mingle.merging.merger import Merger
from mingle.tasks import TaskType


def load(
    model: str | Path,
    revision: str | None = None,
    *,
    task: str | None = None,
    base: nn.Module | str | Path | None = None,
    task_type: TaskType | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """The merged model as a module, in evaluation mode.

        model = mingle.load("merged")
        model = mingle.load("user/name", revision="3f1c0d…")

    Args:
        model: a folder, or the name on the hub, of what `save_pretrained` or `export` wrote.  Of the hub's
            repository only the files that it names are fetched; ``HF_HUB_OFFLINE`` takes them from the cache.
        revision: a commit, branch or tag of the name on the hub; None takes ``main``.
        task: which task's model, where each has a head of its own, or its own model.
        base: the base model, where the folder does not hold it; of exported adapters None takes the one that
            they name, if that is on the hub.
        task_type: the object, where it is of your own and not registered, see `mingle.tasks.register`.
        device: where the model is to live.

    Raises:
        CheckpointError: what cannot be fetched, or a missing, truncated or changed file.
        ValueError: a task that is not merged, or is missing.
    """
    folder = hub_merge.resolve(str(model), revision)
    if (folder / MANIFEST).is_file():
        return _of(Merger.from_pretrained(folder, base, task_type=task_type, device=device), task)
    if (folder / adapters_folder.DESCRIPTION).is_file():
        found = base if base is not None else _base_of(folder)
        return _of(Merger.from_adapters(found, folder, task_type=task_type, device=device), task)
    if task is not None:
        raise ValueError(f"task {task!r}: {folder} holds one plain model; leave the task out")
    plain: Any = (task_type or tasks.of(folder)).load(folder)
    return plain.eval() if device is None else plain.to(device).eval()


def _of(merger: Merger, task: str | None) -> nn.Module:
    owned = merger.method.per_task or any(each.tensors for each in merger.merged)
    if task is None and owned:
        names = ", ".join(merger.task_names)
        raise ValueError(f"each task has a model or a head of its own; name one by task=, of {names}")
    return (merger.model if task is None else merger.model_for(task)).eval()


def _base_of(folder: Path) -> Path:
    """The base that adapters name, from the hub."""
    name = ModelName.noted(adapters_folder.load(folder).description["base"])
    if name.hub_id is None:
        raise CheckpointError(f"{folder}: adapters of a base that is not on the hub; give it as base=")
    return hub.resolve(name.hub_id, name.revision)
