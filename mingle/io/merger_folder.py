"""A merger's folder: one safetensors file per task, one for the common state, the base, a JSON manifest.

    manifest.json                      what the folder holds, with sizes and hashes; written after all of it
    README.md                          the model card, see `mingle.io.folder_card`
    base-<hash>/                       the base model in hub format
    tasks/000-<name>-<hash>.safetensors
    state-<hash>.safetensors           only for methods that keep merged weights; one, or several parts
    generations/0001-<hash>.json       the manifests of earlier saves, see `mingle.io.generations`
    .journal….json, .aside-<hash>…     while a step goes tensor by tensor, see `mingle.io.journal`

Files are named by their content and never overwritten: whatever interrupts a save, every file that the
manifest on disk names is there, and so is every file that an earlier generation names which is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mingle import ranks
from mingle.io import folder_card, generations, journal
from mingle.io.base_files import base_files
from mingle.io.files import CheckpointError, clean_stale, contained, naming, sha256, write_copy, write_json
from mingle.io.hub import ModelName
from mingle.io.leftovers import foreign, sweep
from mingle.io.locks import lock
from mingle.io.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    entries_of,
    entry_of,
    files_of,
    number_of,
    read_manifest,
)
from mingle.io.provenance import versions
from mingle.io.safetensors import hash_of, write_tensors
from mingle.io.shared_folder import check_files_together, check_shared
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

    The processes of one group come here together, and are one writer: the lock is that of rank 0.

    Args:
        folder: made where it does not exist, unless `new` is off: then it has to hold a merger.

    Raises:
        CheckpointError: another process is writing to the folder, it cannot be written to, or not every
            process of the group sees it.
    """
    place = folder.resolve()
    if place in _written.get():
        yield
        return
    with ExitStack() as held:
        with ranks.together("opening the folder"):
            if ranks.rank() == 0:
                if new:
                    with naming(folder):
                        folder.mkdir(parents=True, exist_ok=True)
                else:
                    read_manifest(folder)
                held.enter_context(lock(folder))
                clean_stale(folder)
                _clear(folder, journal.read(folder))
            check_shared(folder)
        token = _written.set(_written.get() | {place})
        try:
            yield
        finally:
            _written.reset(token)


def _clear(folder: Path, noted: journal.Passes) -> None:
    """Remove our files that neither a generation needs nor a journal that is still of use."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        over = noted and journal.is_over(noted, manifest)
        sweep(folder, generations.names(folder, manifest) | (set() if over else journal.files(folder, noted)))
        folder_card.write(folder, manifest)  # if what interrupted a save was between the two
    elif foreign(folder) is None:
        sweep(folder, journal.files(folder, noted))  # what is there is of a first save that did not end


def begin(folder: Path, step: str) -> journal.Journal:
    """The journal of a step of a merge; what other steps have left unfinished is removed.

    Args:
        folder: of which this process is the writer.
        step: see `mingle.io.journal.Journal`.
    """
    found = journal.Journal(folder, step)
    with ranks.together("clearing the folder"):
        if ranks.rank() == 0:
            _clear(folder, found.passes)
    return found


def save(
    folder: Path,
    manifest: dict[str, Any],
    base_hash: str,
    base_name: ModelName,
    base: BaseModel | None,
    tasks: Sequence[Mapping[str, torch.Tensor] | list[dict[str, Any]]],
    state: Tensors | list[dict[str, Any]],
    keep: int | None = None,
) -> dict[str, Any]:
    """Write what changed, the generation and then the manifest; remove what no kept generation names.

    The processes of one group come here together, with the same values, and rank 0 writes.

    Args:
        folder: of the merger.
        manifest: what it says of the merge, in the form of `mingle.io.manifest.MERGE`.
        base_hash, base_name: of its base.
        base: which is written too where it is not there yet, unless it is None.
        tasks: what is kept of each task alone, or the entries of the files where it already is.
        state: what is kept of all together, or the entries of the files where a journal has put it.
        keep: how many generations are kept from now on; None leaves it as it is, at first all.

    Returns:
        The new manifest.

    Raises:
        CheckpointError: another process is writing to the folder, the disk is full, or the folder holds
            something else.
    """
    new: dict[str, Any] = {}
    with writing(folder), ranks.together("saving"):
        if ranks.rank() == 0:
            new = _save(folder, manifest, base_hash, base_name, base, tasks, state, keep)
    return ranks.gather(new)[0]


def _save(
    folder: Path,
    manifest: dict[str, Any],
    base_hash: str,
    base_name: ModelName,
    base: BaseModel | None,
    tasks: Sequence[Mapping[str, torch.Tensor] | list[dict[str, Any]]],
    state: Tensors | list[dict[str, Any]],
    keep: int | None,
) -> dict[str, Any]:
    old = generations.adopted(folder, read_manifest(folder)) if (folder / MANIFEST).exists() else None
    known = generations.tensors(folder, old) if old else {}
    current = {entry["file"] for entry in files_of(old)} if old else set()
    place = f"base-{base_hash[:12]}"
    has_base = old is not None and old["base"]["folder"] == place
    if base is not None and not has_base:
        base.write(folder / place)
        has_base = True
    with naming(folder / "tasks"):
        (folder / "tasks").mkdir(exist_ok=True)

    def written(stem: str, tensors: Mapping[str, torch.Tensor] | list[dict[str, Any]]) -> Any:
        if isinstance(tensors, list):
            return _one_or_more(tensors)
        return _write(folder, stem, tensors, known, current)

    entries = [
        task | {"tensors": written(f"tasks/{i:03d}-{_slug(task['name'])}", tensors)}
        for i, (task, tensors) in enumerate(zip(manifest["tasks"], tasks, strict=True))
    ]
    new = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **manifest,
        "base": {"sha256": base_hash, "folder": place if has_base else None, **base_name._asdict()},
        "tasks": entries,
        "state": written("state", state),
        "versions": versions(),
    }
    new = generations.following(old, new)
    earlier = [entry for entry in old["history"] if number_of(entry) != new["generation"]] if old else []
    keep = keep or (old["keep"] if old else None)
    history = sorted([*earlier, generations.write(folder, new)], key=number_of)
    new |= {"history": generations.kept(history, new["generation"], keep), "keep": keep}
    commit(folder, new)
    return new


def commit(folder: Path, manifest: dict[str, Any], unfinished: Set[str] = frozenset()) -> None:
    """Put a manifest in the place of the folder's, remove what no generation in it needs, and say so.

    Args:
        folder: of the merger.
        manifest: with its history.
        unfinished: the names of files of a journal, which stay too.
    """
    write_json(folder / MANIFEST, manifest)
    sweep(folder, generations.names(folder, manifest) | unfinished)
    folder_card.write(folder, manifest)


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
        return ModelName.noted(self.manifest["base"])

    def check_base(self, found: str) -> None:
        """Refuse any base but the one the tasks were merged into."""
        if found != self._base_hash:
            hashes = f"SHA-256 {self._base_hash[:12]}…, the given one has {found[:12]}…"
            raise CheckpointError(f"{self.folder}: merged into another base model ({hashes})")

    @property
    def _base_hash(self) -> str:
        return str(self.manifest["base"]["sha256"])

    def task_files(self) -> list[journal.PartFiles]:
        """What is kept of each task, each tensor read when it is asked for."""
        files = [entries_of(task["tensors"]) for task in self.manifest["tasks"]]
        return [journal.PartFiles(self.folder, entries) for entries in files]

    def state_tensors(self) -> Tensors:
        return dict(self.state_files())

    def state_files(self) -> journal.PartFiles:
        """The same, each tensor read when it is asked for."""
        return journal.PartFiles(self.folder, entries_of(self.manifest["state"]))


def load(folder: Path) -> Saved:
    """The manifest of a merger's folder, once every file it names is checked.

    Presence, size and hash are compared before any tensor is read; the processes of one group share the work.

    Raises:
        CheckpointError: no manifest, another format or version, or a missing, truncated or changed file; the
            message names the file.
    """
    manifest = read_manifest(folder)
    check_files_together(folder, files_of(manifest), "the manifest")
    return Saved(folder, manifest)


def _write(
    folder: Path,
    stem: str,
    tensors: Mapping[str, torch.Tensor],
    known: Mapping[tuple[str, str], dict[str, Any]],
    current: set[str],
) -> dict[str, Any] | None:
    """Write tensors to a file named by their content, unless there is one; returns its manifest entry.

    Args:
        folder: of the merger.
        stem: how the file's name begins.
        tensors: may be none, which need no file.
        known: the files that are kept, see `mingle.io.generations.tensors`.
        current: the names of those that the manifest names; others are read before they are used again.
    """
    if not tensors:
        return None
    digest = hash_of(folder / stem, tensors)
    name = f"{stem}-{digest[:12]}.safetensors"
    entry = known.get(generations.content_of(name, digest))
    path = folder / (entry["file"] if entry else name)
    if entry and path.is_file() and (entry["file"] in current or sha256(path) == digest):
        return entry
    return entry_of(folder / name, name, write_tensors(folder / name, tensors))


def _one_or_more(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]] | None:
    """The entries as a manifest has them: one file, as all versions have known it, or a list."""
    return list(entries) if len(entries) > 1 else next(iter(entries), None)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:48]
