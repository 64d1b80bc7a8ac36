"""Lazy safetensors in, crash-safe safetensors out.

Reading executes no code and opens nothing outside the named folder: every header is checked in full, against
the size of its file, before any tensor is allocated. Writing goes through a temporary file in the target's
folder and a rename, so whoever looks, whenever the writer is killed, finds the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open

from mingle.io.checkpoint_files import PICKLE_SUFFIXES, find_checkpoint, pickle_error, read_index
from mingle.io.files import (
    MAX_JSON_BYTES,
    CheckpointError,
    naming,
    parse_json,
    refuse_lfs_pointer,
    replacing,
)
from mingle.io.lazy_tensors import LazyTensors, Rows, blocks_of, described
from mingle.io.state_dicts import DEQUANTISE, non_finite
from mingle.options import nearest, shown

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
#: what only quantised models hold: packed values of less than a byte, and the scales of such values
_QUANTISED = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})
_MAX_RANK = 64


@dataclass(frozen=True)
class _Entry:
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # of its data in the file
    file: tuple[int, int, int]  # device, inode and size


class CheckpointReader:
    """The tensors of a checkpoint by name, each read from disk when asked for.

    Accepts one `.safetensors` file, an index of shards, or a folder that holds `model.safetensors`,
    `model.safetensors.index.json` or `adapter_model.safetensors`; a folder with two of them holds two models
    and is refused. Every shard's header is checked here, so a missing, truncated or inconsistent file raises
    `CheckpointError` before any tensor is read. With an index, only the tensors it lists are part of the
    checkpoint. The files stay open: a rename over one of them does not change the reader.
    """

    def __init__(self, folder_or_file: str | Path) -> None:
        source = find_checkpoint(Path(folder_or_file))
        if source.suffix == ".json":
            shard_of = read_index(source)
            headers = {shard: _read_header(shard) for shard in sorted(set(shard_of.values()))}
            for name, shard in shard_of.items():
                if name not in headers[shard]:
                    raise CheckpointError(f"{source}: tensor {shown(name)} is not in its shard {shard}")
            entries = {name: headers[shard][name] for name, shard in shard_of.items()}
        else:
            entries = _read_header(source)
        self._source = source
        self._entries = dict(sorted(entries.items()))
        self._files = {path: _open(path) for path in {entry.path for entry in entries.values()}}

    def keys(self) -> list[str]:
        """All tensor names, sorted."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header alone."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype, from the header alone."""
        return self._entry(name).dtype

    def described(self, name: str) -> torch.Tensor:
        """The tensor on the meta device, from the header alone."""
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")

    def tensor(self, name: str, rows: Rows = ..., *, check_finite: bool = True) -> torch.Tensor:
        """Read one tensor, or rows of it, into fresh CPU memory, in its stored dtype.

        Raises `CheckpointError` for an unknown name, for a file that shrank since it was opened and, unless
        `check_finite` is off, for a NaN or infinity in a floating-point or complex tensor. Where rows are
        asked for, it is an error too if another file has come into the place of the one that was opened.
        """
        entry = self._entry(name)
        with naming(entry.path):
            if rows is ...:
                tensor: torch.Tensor = self._files[entry.path].get_tensor(name)
            else:
                tensor = _rows(entry, rows)
        if check_finite and (found := non_finite(tensor)):
            if rows is not ...:
                return self.tensor(name)  # which raises with what is wrong with all of it
            raise CheckpointError(f"{entry.path}: tensor {name!r}: {found}")
        return tensor

    def state_dict(self, *, check_finite: bool = True) -> dict[str, torch.Tensor]:
        """Read every tensor, in the order of `keys`; see `tensor`."""
        return {name: self.tensor(name, check_finite=check_finite) for name in self}

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self._source}: no tensor {shown(name)}{nearest(name, self._entries)}")
        return self._entries[name]


def _rows(entry: _Entry, rows: slice) -> torch.Tensor:
    """Rows of a tensor; safetensors would read all of it for them, where it does not map the file."""
    row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    tensor = torch.empty((rows.stop - rows.start, *entry.shape[1:]), dtype=entry.dtype)
    left: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    with open(entry.path, "rb", buffering=0) as file:
        if _identity(file) != entry.file:
            raise CheckpointError(f"{entry.path}: was replaced or truncated while it was read")
        file.seek(entry.offset + rows.start * row)
        while left:
            count = file.readinto(left)
            if not count:
                raise CheckpointError(f"{entry.path}: was truncated while it was read")
            left = left[count:]
    return tensor


def _identity(file: IO[bytes]) -> tuple[int, int, int]:
    """What tells a file from another one of the same name."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file atomically and return the SHA-256 of its bytes, in hex.

    The bytes depend only on the tensors and the metadata, to which `format: pt` is added where absent, so the
    hash can name the content. Tensors may be strided in any way and on any device; those that share memory
    are each written in full, and lazy ones are read when it is their turn. Raises `CheckpointError`, with the
    old file untouched, where a tensor has no safetensors form or the disk lacks the space.
    """
    chunks, size = _file(path, tensors, metadata or {})
    digest = hashlib.sha256()
    with replacing(path, size) as file:
        for data in chunks:
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def hash_of(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 that `write_tensors` would return, and its errors, where nothing is written."""
    digest = hashlib.sha256()
    for data in _file(path, tensors, {})[0]:
        digest.update(data)
    return digest.hexdigest()


def _file(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[Iterable[bytes | memoryview], int]:
    """The bytes of a file, piece by piece, and their number."""
    # Widest dtype first: the header's length is a multiple of 8, so every tensor then starts at a multiple of
    # its item size.
    order = sorted(tensors, key=lambda name: (-described(tensors, name).dtype.itemsize, name))
    lazy = isinstance(tensors, LazyTensors)
    header, size = _header(
        path, {name: described(tensors, name) for name in order}, {"format": "pt", **metadata}, lazy
    )
    blocks = (_bytes(block) for name in order for block in blocks_of(tensors, name))
    return chain([header], blocks), size


def _header(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], lazy: bool
) -> tuple[bytes, int]:
    """The bytes before the data, for tensors in the order given, and the size of the whole file.

    Args:
        path: of the file.
        tensors: those that are lazy are on the meta device.
        metadata: the file's.
        lazy: whether they are.
    """
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise CheckpointError(f"{path}: metadata must map strings to strings")
    # safetensors' own writer emits the metadata in random order: equal content would hash differently.
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, tensor in tensors.items():
        if (
            name == "__metadata__"
            or tensor.dtype not in _CODES
            or tensor.layout != torch.strided
            or (tensor.is_meta and not lazy)
        ):
            form = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise CheckpointError(f"{path}: tensor {name!r} has no safetensors form ({form})")
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + position


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order; a copy only where the tensor is not already so on the CPU."""
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of one safetensors file, once its header is known to describe exactly the bytes there."""
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_error(path, [path], path.with_suffix(".safetensors"))
    with naming(path), open(path, "rb") as file:
        identity = _identity(file)
        size = identity[2]
        refuse_lfs_pointer(first := file.read(8), str(path))
        start = 8 + int.from_bytes(first, "little")
        if start > size:
            raise CheckpointError(
                f"{path}: truncated, or not safetensors: expected at least {start} bytes, found {size}"
            )
        if start > 8 + MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: expected a header of at most {MAX_JSON_BYTES} bytes, found {start - 8}"
            )
        header = parse_json(file.read(start - 8), f"{path}: header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header: expected a JSON object")
    header.pop("__metadata__", None)
    entries = {}
    spans = []
    for name, value in header.items():
        shape, dtype, begin, end = _parse_entry(path, name, value)
        entries[name] = _Entry(path, shape, dtype, start + begin, identity)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(
                f"{path}: tensor {shown(name)}: expected its data at offset {position}, found {begin}"
            )
        position = end
    if start + position != size:
        raise CheckpointError(f"{path}: truncated or padded: expected {start + position} bytes, found {size}")
    return entries


def _parse_entry(path: Path, name: str, value: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
    """A header's entry: shape, dtype, and where its data begin and end, as offsets into the data."""
    where = f"{path}: tensor {shown(name)}"
    match value:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]}:
            sane = len(shape) <= _MAX_RANK and all(
                type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)
            )
        case _:
            sane = False
    if not sane:
        raise CheckpointError(f"{where}: malformed header entry")
    if code in _QUANTISED:
        raise CheckpointError(f"{where}: {code} holds the codes or scales of a quantised model; {DEQUANTISE}")
    if code not in _DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {shown(code)}")
    dtype = _DTYPES[code]
    # Without its zeros: strides overflow even in an empty tensor.
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{where}: absurd shape {shape}")
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: expected {expected} bytes for {code} of shape {shape}, found {end - begin}"
        )
    return tuple(shape), dtype, begin, end


def _open(path: Path) -> Any:
    # Read, not mapped: truncating a mapped file kills the process, and two reads of a tensor would share
    # memory.
    with naming(path):
        return safe_open(path, "pt", backend="pread")
