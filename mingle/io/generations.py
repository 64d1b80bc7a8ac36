"""The generations of a merger's folder: what it was after every save that changed a task or the merged model.

    generations/0005-<hash>.json       the manifest of a generation, without what follows
    manifest.json                      that of the generation in use, and beside it
        "generation", "parent"         its number, and that of the generation it was made from
        "history"                      the files of all generations that are kept, itself among them
        "keep"                         how many are kept; null for all

A new generation's number is higher than all that are kept, also after a return to an earlier one.  Its files
of tensors are those that its manifest names; most are shared with other generations.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError, contained, naming, write_json
from mingle.io.manifest import check_files, entry_of, files_of, number_of, read_folder

Manifest = dict[str, Any]
Entries = list[dict[str, Any]]
#: of a manifest, what its generation's file does not have
_OF_FOLDER = ("history", "keep")


def write(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write a generation's file, named by its content; returns its entry in the history."""
    own = {key: value for key, value in manifest.items() if key not in _OF_FOLDER}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    name = f"generations/{own['generation']:04d}-{digest[:12]}.json"
    with naming(folder / "generations"):
        (folder / "generations").mkdir(exist_ok=True)
    write_json(folder / name, own)
    return entry_of(folder / name, name)


def read(folder: Path, entry: Mapping[str, Any]) -> Manifest:
    """The manifest of a generation.

    Raises:
        CheckpointError: its file is missing, changed, or not what it should be.
    """
    try:
        check_files(folder, [entry], "the manifest")
        found = read_folder(contained(folder, entry["file"]))
        if "parent" not in found or found.get("generation") != number_of(entry):
            raise CheckpointError(f"{folder / entry['file']}: not generation {number_of(entry)}")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; `mingle tidy` forgets old generations") from None
    return found


def adopted(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of a folder with generations; where an early version kept none, its state is the first."""
    if "generation" in manifest:
        return manifest
    first = manifest | {"generation": 1, "parent": None}
    return first | {"history": [write(folder, first)], "keep": None}


def following(old: Manifest | None, new: Manifest) -> Manifest:
    """The new manifest with its number: that of the old one where tasks and merged model are the same."""
    if old is None:
        return new | {"generation": 1, "parent": None}
    if _content(old) == _content(new):
        return new | {"generation": old["generation"], "parent": old["parent"]}
    return new | {"generation": number_of(old["history"][-1]) + 1, "parent": old["generation"]}


def _content(manifest: Mapping[str, Any]) -> list[Any]:
    tasks = [(task["name"], task["tensors"]) for task in manifest["tasks"]]
    whole = [manifest[key] for key in ("method", "options", "state")]
    plain: list[Any] = json.loads(json.dumps([tasks, *whole, manifest["base"]["sha256"]]))
    return plain


def kept(history: Entries, current: int, keep: int | None) -> Entries:
    """The newest `keep` generations, one of them the current one; None keeps all."""
    if keep is None:
        return history
    others = [number for number in map(number_of, history) if number != current]
    numbers = {current, *others[max(0, len(others) + 1 - keep) :]}
    return [entry for entry in history if number_of(entry) in numbers]


def all_of(folder: Path, manifest: Manifest) -> list[Manifest]:
    """The manifests of all generations that are kept, oldest first; without any, the folder's own alone."""
    if "history" not in manifest:
        return [manifest]
    numbered = {number_of(entry): entry for entry in manifest["history"]}
    current = manifest["generation"]
    return [manifest if number == current else read(folder, entry) for number, entry in numbered.items()]


def names(folder: Path, manifest: Manifest) -> set[str]:
    """The names of files and folders that the manifest or a generation that is kept needs."""
    needed = {entry["file"] for entry in manifest.get("history", [])}
    for each in all_of(folder, manifest):
        needed |= {entry["file"] for entry in files_of(each)} | {each["base"]["folder"]}
    return needed


def tensors(folder: Path, manifest: Manifest) -> dict[tuple[str, str], dict[str, Any]]:
    """The entries of all files of tensors by what is in them, see `content_of`; the manifest's own first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for each in (manifest, *all_of(folder, manifest)):
        for entry in files_of(each):
            found.setdefault(content_of(entry["file"], entry["sha256"]), entry)
    return found


def content_of(name: str, digest: str) -> tuple[str, str]:
    """What is in a file of that name and SHA-256: whose tensors, and which.

    A task's place in the order is nothing of it, and neither is the hash in the name, in which earlier
    versions had one of another kind.
    """
    stem, _, _ = re.sub(r"^tasks/\d+-", "tasks/", name).rpartition("-")
    return stem, digest


def sizes(manifests: Iterable[Manifest]) -> list[int]:
    """The bytes of tensors that each generation alone names."""
    entries = [{entry["file"]: entry["bytes"] for entry in files_of(each)} for each in manifests]
    return [
        sum(
            size
            for name, size in own.items()
            if not any(name in other for other in entries if other is not own)
        )
        for own in entries
    ]
