"""The manifest of a merger's folder: its form, and whether a file has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError, read_json
from mingle.io.schema import Absent, check
from mingle.options import shown

FORMAT = "mingle-merge"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BASE_NAME = re.compile(r"base-[0-9a-f]{12}")
TENSORS_NAME = re.compile(r"(state|tasks/\d{3,}-[A-Za-z0-9._-]*)-[0-9a-f]{12}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = {"file": TENSORS_NAME, "bytes": int, "sha256": _DIGEST}
_TASK = {
    "name": re.compile(r"(?s).+"),
    "seed_samples": int,
    "skipped": (str, None),
    "notes": [str],
    "labels": Absent(([str], None)),
    "temperature": Absent((float, None)),
    "tensors": (_FILE, None),
}
#: of the manifest; what the options may be, the method knows
_FORM = {
    "method": str,
    "task_type": str,
    "seed": int,
    "dtype": re.compile("float64|float32|float16|bfloat16"),
    "options": {str: object},
    "tasks": [_TASK],
    "matrix": [[(float, None)]],
    "unknown": Absent([[(float, None)]]),
    "metadata": {str: object},
    "base": {"sha256": _DIGEST, "folder": (BASE_NAME, None)},
    "state": (_FILE, None),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a merger's folder, in the form that it should have; the files it names may be missing.

    Raises:
        CheckpointError: no manifest, another format or version, or a fault; the message names file and key.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {folder} does not hold a saved merge")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a {FORMAT} folder")
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {shown(version)}, this mingle reads {FORMAT_VERSION}")
    check(manifest, _FORM, path)
    names = [task["name"] for task in manifest["tasks"]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path}: tasks: two of them are called {twice!r}")
    for i, task in enumerate(manifest["tasks"]):
        if (degree := task.get("temperature")) is not None and degree <= 0:
            raise CheckpointError(
                f"{path}: tasks[{i}].temperature: expected a positive number, found {degree}"
            )
    for key in ("matrix", "unknown"):
        if key in manifest and [len(row) for row in manifest[key]] != [i + 1 for i in range(len(names))]:
            raise CheckpointError(
                f"{path}: {key}: expected a row per task, of one value more than the row before"
            )
    return manifest


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files of tensors that a manifest names."""
    entries = [task["tensors"] for task in manifest["tasks"]] + [manifest["state"]]
    return [entry for entry in entries if entry is not None]
