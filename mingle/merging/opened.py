"""Saved merges that this version of mingle can open: what they ask for exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mingle import methods, tasks
from mingle.io import merger_folder
from mingle.io.files import CheckpointError
from mingle.io.manifest import MANIFEST
from mingle.io.merger_folder import Saved
from mingle.options import OptionError, build, shown
from mingle.tasks import TaskType

#: the options of a method that say how gates learn, and that each task may have of its own
ADAPTATION = ("steps", "lr", "batch_size", "micro_batch_size", "temperature")


def opened(folder: Path, task_type: TaskType | None = None, adapt: Mapping[str, Any] | None = None) -> Saved:
    """The folder, its manifest and files checked, of a known method and task type and with known options.

    Args:
        folder: the folder.
        task_type: an object to be used for a task type of that name.
        adapt: those of the options `ADAPTATION` that change from now on.

    Raises:
        CheckpointError: see `mingle.io.merger_folder.load`; or something unknown, named with the file.
        OptionError: a change of another option, of one that the method does not have, or to a value that it
            cannot have.
    """
    saved = merger_folder.load(folder)
    check_known(saved.manifest, folder / MANIFEST, task_type)
    if not adapt:
        return saved
    merge = saved.manifest
    for name in adapt:
        if name not in ADAPTATION:
            raise OptionError(
                f"{folder}: {name!r} stays as the merge was begun with; what may change is "
                f"{', '.join(ADAPTATION)}"
            )
    options = merge["options"] | dict(adapt)
    build(methods.get(merge["method"]).Options, options, f"method {merge['method']!r}")
    return replace(saved, manifest=merge | {"options": options})


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
