"""A merger's folder that this version of mingle can open: what its manifest asks for exists."""

from __future__ import annotations

from pathlib import Path

from mingle import methods, tasks
from mingle.io import merger_folder
from mingle.io.files import CheckpointError
from mingle.io.manifest import MANIFEST
from mingle.io.merger_folder import Saved
from mingle.options import build, shown
from mingle.tasks import TaskType


def opened(folder: Path, task_type: TaskType | None = None) -> Saved:
    """The folder, its manifest and files checked, of a known method and task type and with known options.

    Args:
        folder: the folder.
        task_type: an object to be used for a task type of that name.

    Raises:
        CheckpointError: see `mingle.io.merger_folder.load`; or something unknown, named with the file.
    """
    saved = merger_folder.load(folder)
    manifest = saved.manifest
    try:
        if task_type is None:
            tasks.get(manifest["task_type"])
        elif task_type.name != manifest["task_type"]:
            raise ValueError(f"task type {shown(manifest['task_type'])}, and {task_type.name!r} was given")
        build(methods.get(manifest["method"]).Options, manifest["options"], "options")
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from None
    return saved
