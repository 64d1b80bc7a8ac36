"""A merger's folder that this version of mingle can open: what its manifest asks for exists."""

from __future__ import annotations

from pathlib import Path

from mingle import methods, tasks
from mingle.io import merger_folder
from mingle.io.files import CheckpointError
from mingle.io.manifest import MANIFEST
from mingle.io.merger_folder import Saved
from mingle.options import build


def opened(folder: Path) -> Saved:
    """The folder, its manifest and files checked, of a known method and task type and with known options.

    Raises:
        CheckpointError: see `mingle.io.merger_folder.load`; or something unknown, named with the file.
    """
    saved = merger_folder.load(folder)
    manifest = saved.manifest
    try:
        tasks.get(manifest["task_type"])
        build(methods.get(manifest["method"]).Options, manifest["options"], "options")
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from None
    return saved
