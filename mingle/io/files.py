"""Files that survive a crash: atomic writes, strict JSON, contained names, and one writer at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

from safetensors import SafetensorError

from mingle.options import closest, shown

logger = logging.getLogger(__name__)

#: of one JSON text, and how many values are in it: the largest models have a few megabytes and a hundred
#: thousand values in one, and whatever is within these limits takes less than 200 MB of memory
MAX_JSON_BYTES, MAX_JSON_VALUES = 16_000_000, 600_000
#: how a file begins that stands for one which git has not fetched
LFS_POINTER = b"version https://git-lfs"
_SPARE_BYTES = 16 << 20
_TEMPORARY = re.compile(r"\.mingle-tmp-\d+-[0-9a-f]{16}-.+")


class CheckpointError(ValueError):
    """A checkpoint, or a file beside it, cannot be read or written.

    The message names the file, and the tensor where there is one.
    """


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities raise `CheckpointError`."""
    try:
        text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise CheckpointError(f"{path}: not written: {error}") from error
    # File names may hold bytes that are not UTF-8, in Python halves of surrogate pairs: Python's escape of
    # them is also JSON's.
    data = text.encode(errors="backslashreplace")
    with replacing(path, len(data)) as file:
        file.write(data)


def json_text(value: Any) -> str:
    """`value` as indented JSON, in ASCII, which every stream takes; NaN and infinities are null."""
    return json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    data = text.encode(errors="backslashreplace")
    with replacing(path, len(data)) as file:
        file.write(data)


def without_nan(value: Any) -> Any:
    """Plain data with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_copy(source: Path, target: Path) -> None:
    """Copy a file's bytes atomically; the copy's mode follows the umask."""
    with (
        naming(source),
        open(source, "rb") as original,
        replacing(target, os.fstat(original.fileno()).st_size) as file,
    ):
        shutil.copyfileobj(original, file)


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES, max_values: int = MAX_JSON_VALUES) -> Any:
    """Parse a UTF-8 JSON file.

    Raises:
        CheckpointError: a duplicate key, a syntax error (with its line), or more than `max_bytes` or
            `max_values`.
    """
    with naming(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: expected at most {max_bytes} bytes of JSON, found {size}")
        return parse_json(file.read(size), str(path), max_values)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex, streamed."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contained(folder: Path, name: str) -> Path:
    """`folder / name`, once it is certain that opening it stays inside `folder`.

    Nothing is opened, and the file need not exist. Raises `CheckpointError` for an absolute path, a `..` and
    a symlink that leads outside. One way out is allowed: a hub cache keeps the files of
    `models--x/snapshots/<rev>`, and of folders in it, as symlinks to `models--x/blobs/<hash>`, and likewise
    those of `datasets--x`.
    """
    # The Windows flavour splits at both slashes and knows drives: one check covers an index of any system.
    parts = PureWindowsPath(name)
    if parts.anchor or ".." in parts.parts:
        raise CheckpointError(f"{folder}: refusing {shown(name)}, which points outside the folder")
    path = folder / name
    try:
        root, target = (Path(os.path.realpath(place)) for place in (folder, path))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {shown(name)} is not a file name: {error}") from error
    repositories = [
        above.parent.parent
        for above in (root, *root.parents)
        if above.parent.name == "snapshots"
        and above.parent.parent.name.startswith(("models--", "datasets--"))
    ]
    cached = any(target.parent == repository / "blobs" for repository in repositories)
    if not (target.is_relative_to(root) or cached):
        raise CheckpointError(f"{path}: refusing a symlink to {target}, outside the folder")
    return path


def clean_stale(folder: Path) -> list[Path]:
    """Remove the temporary files that killed writers left in `folder` and below; return their paths, sorted.

    Call it while holding `lock`, as a living writer's file looks the same.
    """
    stale = sorted(path for path in folder.rglob(".mingle-tmp-*") if is_temporary(path))
    for path in stale:
        with naming(path):
            path.unlink(missing_ok=True)
        logger.info("removed %s, left by a killed writer", path)
    return stale


def is_temporary(path: Path) -> bool:
    """Whether a file is one that `replacing` writes, until it is done."""
    return _TEMPORARY.fullmatch(path.name) is not None and path.is_file()


def file_path(text: str) -> Path:
    """A path as the user wrote it; an empty one would silently be the current folder.

    Raises:
        ValueError: no file can have this path.
    """
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is not a path")
    return Path(text)


def writable(folder: Path) -> None:
    """Raise `CheckpointError` unless files can be written to `folder`, which need not exist yet.

    What is missing of it is made, a file is written in it, and both are removed again: permissions alone do
    not tell, least of all root, of read-only mounts, of /sys or of a disk without room.  A file that a killed
    process left of this is removed too.
    """
    missing = list(itertools.takewhile(lambda path: not os.path.lexists(path), (folder, *folder.parents)))
    found = missing[-1].parent if missing else folder
    if not os.path.exists(found):
        raise CheckpointError(f"{found}: a symlink to {os.readlink(found)}, which does not exist")
    if not os.path.isdir(found):
        raise CheckpointError(f"{found}: not a folder")
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        for stale in folder.glob(".mingle-tmp-*-probe"):
            stale.unlink(missing_ok=True)
        _probe(folder / f".mingle-tmp-{os.getpid()}-{secrets.token_hex(8)}-probe")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to: {error.strerror}") from error
    finally:
        with suppress(OSError):  # another process has begun to use what was made
            for path in reversed(made):
                path.rmdir()


def made(folder: Path) -> None:
    """Make a folder, now rather than after the work, and see that it is `writable`."""
    writable(folder)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _probe(path: Path) -> None:
    try:
        with open(path, "xb") as file:
            file.write(bytes(4096))
    finally:
        path.unlink(missing_ok=True)


def free_space(folder: Path, needed: int) -> None:
    """Raise `CheckpointError` unless the disk of `folder` has room for `needed` bytes and 16 MiB more.

    The folder need not exist yet.
    """
    with naming(folder):
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    if free < needed + _SPARE_BYTES:
        raise CheckpointError(
            f"{folder}: disk full: {needed} bytes and {_SPARE_BYTES} spare are needed, {free} are free; "
            f"make room for {needed + _SPARE_BYTES - free} more, or name a folder on another disk"
        )


def similar(path: Path) -> str:
    """``; did you mean …?`` for what exists and is called most like a path that does not, or nothing."""
    missing = path
    while not os.path.isdir(missing.parent):
        if missing.parent == missing:
            return ""
        missing = missing.parent
    with suppress(OSError):
        if found := closest(missing.name, os.listdir(missing.parent), 0.6):
            whole = missing.parent / found / path.relative_to(missing)
            return f"; did you mean {whole if whole.exists() else missing.parent / found}?"
    return ""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {error}{similar(path)}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def replacing(path: Path, size: int) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends, and is removed when the block raises.

    `size`, in bytes, is how much will be written: the disk is checked for that much room first.
    """
    free_space(path.parent, size)
    temporary = temporary_beside(path)
    try:
        with naming(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
    finally:
        with naming(temporary):
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A name that nobody else has, for a file that is to become `path`; `clean_stale` knows it."""
    # Part of the name: the whole with what stands before it may be longer than a file's name can be.
    return path.with_name(f".mingle-tmp-{os.getpid()}-{secrets.token_hex(8)}-{path.name[:48]}")


def rename(source: Path, target: Path) -> None:
    """Move a file or folder within one folder; once done, it outlasts a power cut."""
    os.replace(source, target)
    # The rename itself lasts only once the folder is on disk.
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_lfs_pointer(data: bytes, where: str) -> None:
    """Raise `CheckpointError` for a file whose beginning, 8 bytes or more, is that of a Git LFS pointer."""
    if data.startswith(LFS_POINTER[: max(8, len(data))]):
        raise CheckpointError(
            f"{where}: a Git LFS pointer, not the file that it stands for; fetch that with `git lfs pull`"
        )


def parse_json(data: bytes, where: str, max_values: int = MAX_JSON_VALUES) -> Any:
    refuse_lfs_pointer(data, where)
    # Some of these bytes may be inside strings; there are not that many in any that we read.
    if (values := sum(map(data.count, (b",", b"[", b"{")))) > max_values:
        raise CheckpointError(f"{where}: expected at most {max_values} JSON values, found {values}")
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}: bad JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: bad JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"duplicate key {shown(Counter(key for key, _ in pairs).most_common(1)[0][0])}")
    return value
