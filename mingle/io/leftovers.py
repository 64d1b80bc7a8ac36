"""What is in a merger's folder and should not be: files that nothing names any more, and those of others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from mingle.io import journal
from mingle.io.base_files import base_files, is_inner_folder
from mingle.io.files import naming
from mingle.io.manifest import BASE_NAME, GENERATION_NAME, TENSORS_NAME


def foreign(folder: Path) -> Path | None:
    """The first file of a folder that is not ours; None where all of them are.

    Ours is what a save writes before the manifest: a first save that was killed leaves such a folder.  Hidden
    files do not count; those of ours are the lock and temporary files.
    """
    return next(_strangers(folder), None)


def _strangers(folder: Path) -> Iterator[Path]:
    for path in _shown(folder):
        real = not path.is_symlink()
        if real and path.is_dir() and path.name in ("tasks", "generations"):
            yield from (file for file in _shown(path) if not _is_ours(file, f"{path.name}/{file.name}"))
        elif real and path.is_dir() and BASE_NAME.fullmatch(path.name):
            ours = base_files(path)
            files = (_shown(file) if is_inner_folder(file) else [file] for file in _shown(path))
            yield from (file for file in chain(*files) if file.is_symlink() or file not in ours)
        elif not _is_ours(path, path.name):
            yield path


def _shown(folder: Path) -> list[Path]:
    with naming(folder):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_ours(path: Path, name: str) -> bool:
    """Whether a file, by its name within the folder, holds tensors of ours or a generation."""
    known = TENSORS_NAME.fullmatch(name) or GENERATION_NAME.fullmatch(name)
    return _is_file(path) and known is not None


def unnamed(folder: Path, kept: set[str]) -> Iterator[Path]:
    """Files and folders of ours whose names are not among `kept`."""
    places = ("base-*", "state-*", "tasks/*", "generations/*", journal.JOURNALS, ".aside-*")
    for path in chain.from_iterable(sorted(folder.glob(place)) for place in places):
        name = path.relative_to(folder).as_posix()
        if name in kept or path.is_symlink():
            continue
        hidden = _is_file(path) and journal.is_ours(name)
        if hidden or _is_ours(path, name) or (BASE_NAME.fullmatch(name) and path.is_dir()):
            yield path


def sweep(folder: Path, kept: set[str]) -> None:
    """Remove what is `unnamed`."""
    for path in unnamed(folder, kept):
        with naming(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def size(paths: Iterator[Path]) -> int:
    """The bytes of files, and of all files in folders."""
    files = chain.from_iterable([path] if path.is_file() else path.rglob("*") for path in paths)
    return sum(path.stat().st_size for path in files if _is_file(path))


def finished_bytes(folder: Path) -> int:
    """The bytes of what an interrupted step has finished in a folder; the same step goes on from there."""
    return size(folder / name for name in journal.files(folder, journal.read(folder)))
