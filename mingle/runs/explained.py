"""What `mingle explain` found, kept beside the merged model that it is about, for the model's page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mingle.io.files import read_json, without_nan, write_json
from mingle.io.manifest import read_manifest
from mingle.io.schema import check
from mingle.merging.explain import STEPS, Explanation

EXPLAINED = "explain.json"
_TASK = {
    "task": str,
    "start": str,
    "before": (float, None),
    "changes": {str: (float, None)},
    "merged": (float, None),
}
_FORM = {"merge": str, "suite": (str, None), "steps": [str], "tasks": [_TASK]}


def described(found: Sequence[Explanation]) -> dict[str, Any]:
    """The numbers, and the names of the steps in order."""
    return without_nan({"steps": list(STEPS), "tasks": [vars(each) for each in found]})


def keep(folder: Path, found: Sequence[Explanation], suite: str | None) -> Path:
    """Write ``explain.json`` into a merged model's folder.

    Args:
        folder: the folder that `mingle merge` wrote.
        found: about all its tasks.
        suite: of the samples; None for the one that the merge was made with.

    Raises:
        CheckpointError: no merged model there, or a folder that cannot be written to.
    """
    manifest = read_manifest(folder)
    noted = manifest["metadata"].get("suite")
    used = suite or (noted if isinstance(noted, str) else None)
    about = {"merge": _digest(manifest), "suite": used}
    write_json(folder / EXPLAINED, about | described(found), sort_keys=False)
    return folder / EXPLAINED


def read(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the merge that the manifest describes; nothing where there is none, or of an older one.

    Raises:
        CheckpointError: a broken file.
    """
    path = folder / EXPLAINED
    if not path.is_file():
        return {}
    found: dict[str, Any] = read_json(path)
    check(found, _FORM, path)
    return found if found["merge"] == _digest(manifest) else {}


def _digest(manifest: Mapping[str, Any]) -> str:
    """A hash of what is merged; another arrival, or the loss of a task, changes it."""
    files = [task["tensors"] and task["tensors"]["sha256"] for task in manifest["tasks"]]
    state = manifest["state"] and manifest["state"]["sha256"]
    parts = [manifest["base"]["sha256"], [task["name"] for task in manifest["tasks"]], files, state]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
