"""Back to an earlier generation of a merger's folder, and the end of those that nobody needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mingle.io import generations, journal
from mingle.io.files import CheckpointError, clean_stale
from mingle.io.leftovers import size, unnamed
from mingle.io.locks import lock
from mingle.io.manifest import check_files, files_of, number_of, read_manifest
from mingle.io.merger_folder import commit, writing


def rollback(folder: Path, number: int) -> None:
    """Return to a generation that is kept; later ones are kept too.

    Raises:
        CheckpointError: no such generation, a file of it that is missing or was changed, another process that
            writes to the folder, or a full disk.
    """
    with writing(folder, new=False):
        manifest = read_manifest(folder)
        history = {number_of(entry): entry for entry in manifest.get("history", [])}
        if number not in history:
            there = ", ".join(map(str, history)) or "none: an earlier version of mingle saved it"
            raise CheckpointError(f"{folder}: generation {number} is not kept; there are {there}")
        target = generations.read(folder, history[number])
        check_files(folder, files_of(target), f"generation {number}")
        base = target["base"]["folder"]
        if base is not None and not (folder / base).is_dir():
            raise CheckpointError(f"{folder / base}: missing, although generation {number} names it")
        commit(folder, target | {"history": manifest["history"], "keep": manifest["keep"]})


def tidy(folder: Path, keep: int, *, only_tell: bool = False) -> int:
    """Forget all but the newest `keep` generations, one of them the current one.

    Args:
        folder: of the merger.
        keep: 1 or more.
        only_tell: change nothing.

    Returns:
        The bytes of the files that only these needed, and of what interrupted saves left.

    Raises:
        CheckpointError: not a merger's folder, or another process writes to it.
    """
    manifest = read_manifest(folder)
    if only_tell:
        return size(_unneeded(folder, _shortened(manifest, keep)))
    with lock(folder):
        clean_stale(folder)
        manifest = _shortened(read_manifest(folder), keep)
        freed = size(_unneeded(folder, manifest))
        commit(folder, manifest, _unfinished(folder))
    return freed


def keep_only(folder: Path, count: int) -> None:
    """Keep that many generations from now on, and forget older ones; for the folder's writer.

    Args:
        folder: of the merger.
        count: 1 or more.
    """
    manifest = read_manifest(folder)
    if manifest["keep"] != count:
        commit(folder, _shortened(manifest, count) | {"keep": count}, _unfinished(folder))


def _unneeded(folder: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    return unnamed(folder, generations.names(folder, manifest) | _unfinished(folder))


def _unfinished(folder: Path) -> set[str]:
    """What a task that was broken off has finished: the same command goes on from there."""
    return journal.files(folder, journal.read(folder))


def _shortened(manifest: dict[str, Any], keep: int) -> dict[str, Any]:
    if "history" not in manifest:
        return manifest
    return manifest | {"history": generations.kept(manifest["history"], manifest["generation"], keep)}
