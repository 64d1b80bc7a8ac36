"""Saved merges that this version of mingle can open: what they ask for exists, and their tensors fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mingle import methods, tasks
from mingle.io import merger_folder
from mingle.io.files import CheckpointError
from mingle.io.manifest import MANIFEST
from mingle.io.merger_folder import Saved
from mingle.methods import MergeMethod
from mingle.methods.base import Tensors
from mingle.options import build


def opened(folder: Path) -> Saved:
    """The folder, its manifest and files checked, of a known method and task type and with known options.

    Raises:
        CheckpointError: see `mingle.io.merger_folder.load`; or something unknown, named with the file.
    """
    saved = merger_folder.load(folder)
    check_known(saved.manifest, folder / MANIFEST)
    return saved


def check_known(merge: Mapping[str, Any], path: Path) -> None:
    """Raise `CheckpointError` for a method, a task type or an option that this version does not know.

    Args:
        merge: what the file says, in the form of `mingle.io.manifest.MERGE`.
        path: of the file.
    """
    try:
        tasks.get(merge["task_type"])
        build(methods.get(merge["method"]).Options, merge["options"], "options")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def restore(method: MergeMethod, saved: list[Tensors], state: Tensors, folder: Path) -> None:
    """Bring a method to the state that was saved; tensors are moved to its model's device.

    Raises:
        CheckpointError: tensors that belong to something else.
    """
    place = next(iter(method.base.values())).device
    moved = [_to(place, tensors) for tensors in saved]
    try:
        method.restore(moved, _to(place, state))
        for index, tensors in enumerate(saved):
            if left := sorted(tensors.keys() - method.task_tensors(index).keys()):
                raise ValueError(f"there is no place for {left[0]!r}")
    # what names, numbers and shapes of tensors that belong to something else lead to
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = f"the tensors do not fit the method {method.name!r} with these options"
        raise CheckpointError(f"{folder}: {reason}: {error}") from error


def _to(place: torch.device, tensors: Tensors) -> Tensors:
    return {name: tensor.to(place) for name, tensor in tensors.items()}
