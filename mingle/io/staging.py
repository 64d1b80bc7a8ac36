"""A folder that is there whole or not at all: written beside its place, and moved there at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mingle.io.adapter_config import CONFIG, WEIGHTS
from mingle.io.base_files import is_inner_folder
from mingle.io.files import CheckpointError, free_space, is_temporary, naming, rename, writable
from mingle.io.locks import lock


def check_target(folder: Path) -> None:
    """Raise `CheckpointError` unless a model can be written to `folder`, a new or an empty folder."""
    in_use = os.path.exists(folder) and not os.path.isdir(folder)
    if not in_use:
        writable(folder)  # which also clears away the trial that a killed export has left
        in_use = os.path.isdir(folder) and any(folder.iterdir())
    if in_use:
        raise CheckpointError(
            f"{folder}: already exists and is not an empty folder; an export overwrites nothing"
        )
    _check_staging(_staging(folder.resolve()))


@contextmanager
def staged(folder: Path, size: int) -> Iterator[Path]:
    """A folder to write files to, some in folders of their own, which becomes `folder` when the block ends.

    An interruption leaves no folder, and the next export to the same place clears away what was left behind.

    Args:
        folder: a new or an empty folder.
        size: about how many bytes will be written.

    Raises:
        CheckpointError: the folder is in use, another process is writing it, or the disk is full.
    """
    check_target(folder)
    folder = folder.resolve()
    staging = _staging(folder)
    free_space(staging, size)
    with naming(staging):
        staging.mkdir(parents=True, exist_ok=True)
    with lock(staging):
        try:
            with naming(staging):
                for left in staging.iterdir():
                    if left.is_dir():
                        shutil.rmtree(left)
                    elif left.name != ".lock":
                        left.unlink()
            yield staging
            with naming(folder):
                (staging / ".lock").unlink()
                rename(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _staging(folder: Path) -> Path:
    """Where a model is written before it is moved to `folder`; only the beginning of a long name is kept."""
    return folder.parent / f".mingle-export-{folder.name[:48]}"


def _check_staging(staging: Path) -> None:
    """Refuse to clear what no killed export has left: files, and folders of adapters and modules."""
    if os.path.lexists(staging):
        real = staging.is_dir() and not staging.is_symlink()
        strange = next(_strangers(staging), None) if real else staging
        if strange is not None:
            raise CheckpointError(f"{strange}: in the way of an export, and not left by an earlier one")


def _strangers(staging: Path) -> Iterator[Path]:
    """What is in the folders in the staging folder and belongs neither to an adapter nor to a module."""
    for folder in staging.iterdir():
        if folder.is_dir() and not is_inner_folder(folder):
            yield from (
                [folder]
                if folder.is_symlink()
                else (
                    path
                    for path in folder.iterdir()
                    if path.is_dir() or not (path.name in (CONFIG, WEIGHTS) or is_temporary(path))
                )
            )
