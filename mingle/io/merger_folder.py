"""A merger's folder: one safetensors file per task, one for the common state, the base, a JSON manifest.

    manifest.json                      what the folder holds, with sizes and hashes; always written last
    base-<hash>/                       the base model in hub format
    tasks/000-<name>-<hash>.safetensors
    state-<hash>.safetensors           only for methods that keep merged weights; one, or several parts
    .journal.json, .aside-<hash>…      while a step goes tensor by tensor, see `mingle.io.journal`

Files are named by their content and never overwritten: whatever interrupts a save, every file that the
manifest on disk names is there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mingle.io import journal
from mingle.io.base_files import base_files, is_inner_folder
from mingle.io.files import CheckpointError, clean_stale, contained, naming, write_copy, write_json
from mingle.io.hub import ModelName
from mingle.io.locks import lock
from mingle.io.manifest import (
    BASE_NAME,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    TENSORS_NAME,
    check_files,
    entries_of,
    entry_of,
    files_of,
    read_manifest,
)
from mingle.io.provenance import versions
from mingle.io.safetensors import CheckpointReader, write_tensors
from mingle.io.state_dicts import state_hash as state_hash

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BaseModel:
    """The base to put beside the merged state.

    Attributes:
        folder: the hub folder that it came from, if any; else there are
        files: contents of JSON files by their names, and
        tensors: gives them by their names in a file.
    """

    folder: Path | None
    files: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[], Tensors] = dict

    def write(self, target: Path) -> None:
        """Write it to a folder, which may hold some of it already."""
        names = self.files if self.folder is None else _names(self.folder)
        for name in names:
            with naming(target):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
            if self.folder is None:
                write_json(target / name, self.files[name])
            else:
                write_copy(contained(self.folder, name), target / name)
        if self.folder is None:
            write_tensors(target / "model.safetensors", self.tensors())


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in base_files(folder)]


_written: ContextVar[frozenset[Path]] = ContextVar("folders whose writer this is", default=frozenset())


@contextmanager
def writing(folder: Path, *, new: bool = True) -> Iterator[None]:
    """Be the only writer of a merger's folder for several saves, and clear up what interrupted ones left.

    Args:
        folder: made where it does not exist, unless `new` is off: then it has to hold a merger.

    Raises:
        CheckpointError: another process is writing to the folder, or it cannot be written to.
    """
    place = folder.resolve()
    if place in _written.get():
        yield
        return
    if new:
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
    else:
        read_manifest(folder)
    with lock(folder):
        clean_stale(folder)
        _clear(folder, journal.read(folder))
        token = _written.set(_written.get() | {place})
        try:
            yield
        finally:
            _written.reset(token)


def _clear(folder: Path, noted: journal.Passes) -> None:
    """Remove our files that neither the manifest names nor a journal that is still of use."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        over = noted and journal.entries(noted[-1]) == entries_of(manifest["state"])
        named = {entry["file"] for entry in files_of(manifest)} | {manifest["base"]["folder"]}
        _sweep(folder, named | (set() if over else journal.files(noted)))
    elif foreign(folder) is None:
        _sweep(folder, journal.files(noted))  # what is there is of a first save that did not end


def begin(folder: Path, step: str) -> journal.Journal:
    """The journal of a step of a merge; what other steps have left unfinished is removed.

    Args:
        folder: of which this process is the writer.
        step: see `mingle.io.journal.Journal`.
    """
    found = journal.Journal(folder, step)
    _clear(folder, found.passes)
    return found


def save(
    folder: Path,
    manifest: dict[str, Any],
    base_hash: str,
    base_name: ModelName,
    base: BaseModel | None,
    tasks: list[Tensors],
    state: Tensors | list[dict[str, Any]],
) -> None:
    """Write what changed and then the manifest; remove what the new manifest no longer names.

    Args:
        folder: the merger's folder.
        manifest: what it says of the merge, in the form of `mingle.io.manifest.MERGE`.
        base_hash, base_name: of the base.
        base: the base, to be written too where it is not there yet.
        tasks: what is kept of each task alone.
        state: what is kept of all together, or the entries of the files where a journal has put it.

    Raises:
        CheckpointError: another process is writing to the folder, the disk is full, or the folder holds
            something else.
    """
    with writing(folder):
        old = read_manifest(folder) if (folder / MANIFEST).exists() else None
        known = {entry["file"]: entry for entry in files_of(old)} if old else {}
        place = f"base-{base_hash[:12]}"
        has_base = old is not None and old["base"]["folder"] == place
        if base is not None and not has_base:
            base.write(folder / place)
            has_base = True
        with naming(folder / "tasks"):
            (folder / "tasks").mkdir(exist_ok=True)
        entries = [
            task | {"tensors": _write(folder, f"tasks/{i:03d}-{_slug(task['name'])}", tensors, known)}
            for i, (task, tensors) in enumerate(zip(manifest["tasks"], tasks, strict=True))
        ]
        new = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **manifest,
            "base": {"sha256": base_hash, "folder": place if has_base else None, **base_name._asdict()},
            "tasks": entries,
            "state": _write(folder, "state", state, known)
            if isinstance(state, dict)
            else _one_or_more(state),
            "versions": versions(),
        }
        write_json(folder / MANIFEST, new)
        _sweep(folder, {entry["file"] for entry in files_of(new)} | {place})


@dataclass(frozen=True)
class Saved:
    """A merger's folder whose manifest and files were checked."""

    folder: Path
    manifest: dict[str, Any]

    def base_folder(self) -> Path:
        """The base's folder.

        Raises:
            CheckpointError: the folder was saved without it.
        """
        name = self.manifest["base"]["folder"]
        if name is None:
            wanted = f"give it as base= (SHA-256 {self._base_hash[:12]}…)"
            raise CheckpointError(f"{self.folder}: saved without its base model; {wanted}")
        return contained(self.folder, name)

    def base_name(self) -> ModelName:
        """What the base was called where it came from; early versions did not note it."""
        base = self.manifest["base"]
        return ModelName(base.get("name"), base.get("revision"))

    def check_base(self, found: str) -> None:
        """Refuse any base but the one the tasks were merged into."""
        if found != self._base_hash:
            hashes = f"SHA-256 {self._base_hash[:12]}…, the given one has {found[:12]}…"
            raise CheckpointError(f"{self.folder}: merged into another base model ({hashes})")

    @property
    def _base_hash(self) -> str:
        return str(self.manifest["base"]["sha256"])

    def task_tensors(self) -> list[Tensors]:
        return [_read(self.folder, task["tensors"]) for task in self.manifest["tasks"]]

    def state_tensors(self) -> Tensors:
        return dict(self.state_files())

    def state_files(self) -> journal.PartFiles:
        """The same, each tensor read when it is asked for."""
        return journal.PartFiles(self.folder, entries_of(self.manifest["state"]))


def foreign(folder: Path) -> Path | None:
    """The first file of a folder that is not ours; None where all of them are.

    Ours is what a save writes before the manifest: a first save that was killed leaves such a folder.  Hidden
    files do not count; those of ours are the lock and temporary files.
    """
    return next(_strangers(folder), None)


def _strangers(folder: Path) -> Iterator[Path]:
    for path in _shown(folder):
        real = not path.is_symlink()
        if real and path.is_dir() and path.name == "tasks":
            yield from (file for file in _shown(path) if not _is_tensors(file, f"tasks/{file.name}"))
        elif real and path.is_dir() and BASE_NAME.fullmatch(path.name):
            ours = base_files(path)
            files = (_shown(file) if is_inner_folder(file) else [file] for file in _shown(path))
            yield from (file for file in chain(*files) if file.is_symlink() or file not in ours)
        elif not _is_tensors(path, path.name):
            yield path


def _shown(folder: Path) -> list[Path]:
    with naming(folder):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_tensors(path: Path, name: str) -> bool:
    """Whether a file, by its name within the folder, holds tensors of ours."""
    return _is_file(path) and TENSORS_NAME.fullmatch(name) is not None


def load(folder: Path) -> Saved:
    """The manifest of a merger's folder, once every file it names is checked.

    Presence, size and hash are compared before any tensor is read.

    Raises:
        CheckpointError: no manifest, another format or version, or a missing, truncated or changed file; the
            message names the file.
    """
    manifest = read_manifest(folder)
    check_files(folder, files_of(manifest), "the manifest")
    return Saved(folder, manifest)


def _write(
    folder: Path, stem: str, tensors: Tensors, known: dict[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Write tensors to a file named by their content, unless it exists; returns its manifest entry."""
    if not tensors:
        return None
    name = f"{stem}-{state_hash(tensors)[:12]}.safetensors"
    if name in known and (folder / name).is_file():
        return known[name]
    digest = write_tensors(folder / name, tensors)
    return entry_of(folder / name, name, digest)


def _sweep(folder: Path, kept: set[str]) -> None:
    """Remove our files that the manifest no longer names, be they of the last save or an interrupted one."""
    patterns = ("base-*", "state-*", "tasks/*", journal.JOURNAL, ".aside-*")
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        name = path.relative_to(folder).as_posix()
        if name in kept or path.is_symlink():
            continue
        with naming(path):
            if BASE_NAME.fullmatch(name) and path.is_dir():
                shutil.rmtree(path)
            elif _is_tensors(path, name) or (_is_file(path) and journal.is_ours(name)):
                path.unlink()


def _one_or_more(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]] | None:
    """The entries as a manifest has them: one file, as all versions have known it, or a list."""
    return list(entries) if len(entries) > 1 else next(iter(entries), None)


def _read(folder: Path, entry: dict[str, Any] | None) -> Tensors:
    return {} if entry is None else CheckpointReader(contained(folder, entry["file"])).state_dict()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:48]
