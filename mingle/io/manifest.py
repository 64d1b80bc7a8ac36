"""What a merger's folder and a folder of adapters say of themselves: the form, and whether a file has it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError, contained, read_json, sha256, similar
from mingle.io.schema import Absent, Several, check
from mingle.options import shown

FORMAT = "mingle-merge"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BASE_NAME = re.compile(r"base-[0-9a-f]{12}")
TENSORS_NAME = re.compile(r"(state|tasks/\d{3,}-[A-Za-z0-9._-]*)-[0-9a-f]{12}\.safetensors")
GENERATION_NAME = re.compile(r"generations/(\d{4,})-[0-9a-f]{12}\.json")
_SHOWN = 8
DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = {"file": TENSORS_NAME, "bytes": int, "sha256": DIGEST}
#: what a base or a fine-tuned model is called; early versions did not say
BASE = {"name": Absent((str, None)), "revision": Absent((str, None)), "license": Absent((str, None))}
#: of a task in any folder of a merge
TASK = {
    "name": re.compile(r"(?s).+"),
    "seed_samples": int,
    "skipped": (str, None),
    "notes": [str],
    "labels": Absent(([str], None)),
    "temperature": Absent((float, None)),
    "model": Absent(BASE),
}
#: what the samples of a task were taken for, see `mingle.merging.answers`
ANSWERS = {
    "taken": {str: int},
    "confused": [{"wanted": str, "given": str, "count": int, "samples": int}],
}
#: of any folder of a merge; what the options may be, the method knows
MERGE = {
    "method": str,
    "task_type": str,
    "seed": int,
    "dtype": re.compile("float64|float32|float16|bfloat16"),
    "options": {str: object},
    "tasks": [TASK],
    "matrix": [[(float, None)]],
    "unknown": Absent([[(float, None)]]),
    "removed": Absent([{"name": str, "stays": [str], "tasks": [str]}]),
    "answers": Absent({str: ANSWERS}),
}
_FORM = MERGE | {
    "tasks": [TASK | {"tensors": (_FILE, None)}],
    "metadata": {str: object},
    "base": BASE | {"sha256": DIGEST, "folder": (BASE_NAME, None)},
    "state": (Several(_FILE), None),
    "versions": Absent({str: str}),
    # of the generations, see `mingle.io.generations`; early versions kept none
    "generation": Absent(int),
    "parent": Absent((int, None)),
    "history": Absent([_FILE | {"file": GENERATION_NAME}]),
    "keep": Absent((int, None)),
}


_GENERATIONS = ("generation", "parent", "history", "keep")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a merger's folder, in the form that it should have; the files it names may be missing.

    Raises:
        CheckpointError: no manifest, another format or version, or a fault; the message names file and key.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {folder} does not hold a saved merge{_inside(folder)}")
    found = read_folder(path)
    if absent := [key for key in _GENERATIONS if key not in found]:
        if len(absent) < len(_GENERATIONS):
            raise CheckpointError(f"{path}: {absent[0]} is missing")
    else:
        numbers = list(map(number_of, found["history"]))
        if numbers != sorted(set(numbers)) or found["generation"] not in numbers:
            raise CheckpointError(
                f"{path}: history: expected every generation once and in order, and generation "
                f"{found['generation']} among them"
            )
        if found["keep"] is not None and found["keep"] < 1:
            raise CheckpointError(f"{path}: keep: expected 1 or more, found {found['keep']}")
    return found


def read_folder(path: Path) -> dict[str, Any]:
    """What a file, the manifest or a generation's, says of a merger's folder; see `read_manifest`."""
    return read_merge(path, FORMAT, FORMAT_VERSION, _FORM)


def number_of(entry: Mapping[str, Any]) -> int:
    """The number of the generation whose file this entry names."""
    match = GENERATION_NAME.fullmatch(entry["file"])
    assert match is not None  # the form says so
    return int(match[1])


def _inside(folder: Path) -> str:
    """Where a folder without a manifest has merges inside, as of several orders; or one that is like it."""
    if not folder.exists():
        return similar(folder)
    inside = sorted(path.parent for part in ("*", "merged/*") for path in folder.glob(f"{part}/{MANIFEST}"))
    return f"; there are some in {', '.join(map(str, inside[:_SHOWN]))}" if inside else ""


def read_merge(path: Path, kind: str, version: int, form: dict[str, Any]) -> dict[str, Any]:
    """What a JSON file says of a merge, in the form that it should have.

    Args:
        path: of the file.
        kind, version: its format, and the version of it.
        form: see `mingle.io.schema`; `MERGE` and more.

    Raises:
        CheckpointError: another format or version, or a fault; the message names file and key.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != kind:
        raise CheckpointError(f"{path}: not the manifest of a {kind} folder")
    its_version = found.get("format_version")
    if type(its_version) is not int or its_version != version:
        newer = type(its_version) is int and its_version > version
        advice = "; it was written by a newer one: pip install --upgrade mingle-merge" if newer else ""
        raise CheckpointError(
            f"{path}: format version {shown(its_version)}, this mingle reads {version}{advice}"
        )
    check(found, form, path)
    names = [task["name"] for task in found["tasks"]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path}: tasks: two of them are called {twice!r}")
    for i, task in enumerate(found["tasks"]):
        if (degree := task.get("temperature")) is not None and degree <= 0:
            raise CheckpointError(
                f"{path}: tasks[{i}].temperature: expected a positive number, found {degree}"
            )
    for key in ("matrix", "unknown"):
        if key in found and [len(row) for row in found[key]] != [i + 1 for i in range(len(names))]:
            raise CheckpointError(
                f"{path}: {key}: expected a row per task, of one value more than the row before"
            )
    return found


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files of tensors that a manifest names."""
    entries = [entry for task in manifest["tasks"] for entry in entries_of(task["tensors"])]
    return entries + entries_of(manifest["state"])


def entries_of(value: Any) -> list[dict[str, Any]]:
    """The entries of files in a manifest's value: none, one, or a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def check_files(folder: Path, entries: Iterable[Mapping[str, Any]], source: str) -> None:
    """Compare presence, size and hash of files with what `source` in it says of them.

    Raises:
        CheckpointError: a missing, truncated or changed file, which the message names.
    """
    for entry in entries:
        path = contained(folder, entry["file"])
        if not os.path.isfile(path):  # also for a name that no file can have
            raise CheckpointError(f"{path}: missing, although {source} names it")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: expected {entry['bytes']} bytes, found {size}")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path}: its content is not what {source} says (SHA-256 differs)")


def size_of(manifest: dict[str, Any]) -> int:
    """How many bytes a merge's folder holds beside its base."""
    return sum(entry["bytes"] for entry in files_of(manifest))


def entry_of(path: Path, name: str, digest: str | None = None) -> dict[str, Any]:
    """What a manifest says of the file at `path`, called `name` within its folder, with that SHA-256."""
    return {"file": name, "bytes": path.stat().st_size, "sha256": digest or sha256(path)}
