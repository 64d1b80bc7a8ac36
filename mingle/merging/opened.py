"""Saved merges that this version of mingle can open: what they ask for exists, and their tensors fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mingle import methods, tasks
from mingle.io import merger_folder
from mingle.io.files import CheckpointError
from mingle.io.manifest import MANIFEST
from mingle.io.merger_folder import Saved
from mingle.methods import MergeMethod
from mingle.methods.base import Tensors
from mingle.options import build, shown
from mingle.tasks import TaskType
from mingle.tasks.heads import put_head


def opened(folder: Path, task_type: TaskType | None = None) -> Saved:
    """The folder, its manifest and files checked, of a known method and task type and with known options.

    Args:
        folder: the folder.
        task_type: an object to be used for a task type of that name.

    Raises:
        CheckpointError: see `mingle.io.merger_folder.load`; or something unknown, named with the file.
    """
    saved = merger_folder.load(folder)
    check_known(saved.manifest, folder / MANIFEST, task_type)
    return saved


def check_known(merge: Mapping[str, Any], path: Path, task_type: TaskType | None = None) -> None:
    """Raise `CheckpointError` for a method, a task type or an option that this version does not know.

    Args:
        merge: what the file says, in the form of `mingle.io.manifest.MERGE`.
        path: of the file.
        task_type: an object to be used for a task type of that name.
    """
    try:
        if task_type is None:
            tasks.get(merge["task_type"])
        elif task_type.name != merge["task_type"]:
            raise ValueError(f"task type {shown(merge['task_type'])}, and {task_type.name!r} was given")
        build(methods.get(merge["method"]).Options, merge["options"], "options")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def restore(
    method: MergeMethod, tasks: list[Tensors], state: Tensors, head: Mapping[str, Tensor], folder: Path
) -> None:
    """Bring a method, into which nothing is merged yet, to the state that was saved.

    Args:
        method: of the same options and base as the saved one.
        tasks, state: what it gave as `task_tensors` and `state_tensors`, on its model's device.
        head: to be put into its model.
        folder: which they are from.

    Raises:
        CheckpointError: tensors that belong to something else.
    """
    try:
        method.restore(tasks, state)
        for index, tensors in enumerate(tasks):
            if left := sorted(tensors.keys() - method.task_tensors(index).keys()):
                raise ValueError(f"there is no place for {left[0]!r}")
        put_head(method.model, head)
    # what names, numbers and shapes of tensors that belong to something else lead to
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = f"the tensors do not fit the method {method.name!r} with these options"
        raise CheckpointError(f"{folder}: {reason}: {error}") from error
