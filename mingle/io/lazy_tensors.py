"""Tensors by name, of which no more is in memory than is asked for: one of them, or rows of a large one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from types import EllipsisType

import torch
from torch import Tensor

#: rows of a tensor along its first dimension, or all of it
Rows = slice | EllipsisType
#: how many entries there are in a block of rows, but for single rows that have more; 16 MiB in float32
BLOCK_ENTRIES = 1 << 22


def row_blocks(tensor: Tensor) -> list[Rows]:
    """The blocks that a tensor is worked on in; they depend on its shape alone.  Small ones are one block."""
    if tensor.numel() <= BLOCK_ENTRIES or not tensor.dim():
        return [...]
    rows = max(1, BLOCK_ENTRIES // (tensor.numel() // len(tensor)))
    return [slice(start, min(start + rows, len(tensor))) for start in range(0, len(tensor), rows)]


def consecutive(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in groups of those that follow one another: as many as `limit` bytes hold, or a larger one alone.

    Args:
        sizes: the bytes of what has each name.
        limit: of a group.
    """
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


class LazyTensors(Mapping[str, Tensor]):
    """A mapping that reads or makes a tensor when it is asked for, and knows its shape and dtype before.

    Args:
        names: those that it has, in their order; quick to look one up in.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    @abstractmethod
    def described(self, name: str) -> Tensor:
        """The tensor on the meta device."""

    @abstractmethod
    def rows(self, name: str, rows: Rows) -> Tensor:
        """Rows of the tensor, or all of it, in memory of their own."""

    def in_rows(self, name: str) -> bool:
        """Whether rows of it take less memory than all of it."""
        return True

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, ...)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a mapping by itself would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(LazyTensors):
    """Several mappings as one, or some of what is in them; of what is in two, the later one's counts."""

    def __init__(self, *parts: Mapping[str, Tensor], names: Collection[str] | None = None) -> None:
        every = {name: part for part in parts for name in part}
        self._part = every if names is None else {name: every[name] for name in names}
        super().__init__(self._part)

    def described(self, name: str) -> Tensor:
        return described(self._part[name], name)

    def rows(self, name: str, rows: Rows) -> Tensor:
        return rows_of(self._part[name], name, rows)

    def in_rows(self, name: str) -> bool:
        return in_rows(self._part[name], name)


class OnDevice(LazyTensors):
    """The tensors of a mapping on a device."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__(tensors)
        self._tensors, self._device = tensors, device

    def described(self, name: str) -> Tensor:
        return described(self._tensors, name)

    def rows(self, name: str, rows: Rows) -> Tensor:
        return rows_of(self._tensors, name, rows).to(self._device)

    def in_rows(self, name: str) -> bool:
        return in_rows(self._tensors, name)


def chosen(tensors: Mapping[str, Tensor], names: Collection[str]) -> Mapping[str, Tensor]:
    """Some of a mapping's tensors, as lazy as they are."""
    if isinstance(tensors, LazyTensors):
        return Joined(tensors, names=names)
    return {name: tensors[name] for name in names}


def described(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of a mapping, for its shape and dtype."""
    return tensors.described(name) if isinstance(tensors, LazyTensors) else tensors[name]


def in_rows(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether rows of a mapping's tensor take less memory than all of it."""
    return not isinstance(tensors, LazyTensors) or tensors.in_rows(name)


def rows_of(tensors: Mapping[str, Tensor], name: str, rows: Rows) -> Tensor:
    """Rows of a mapping's tensor, or all of it."""
    if isinstance(tensors, LazyTensors):
        return tensors.rows(name, rows)
    return tensors[name] if rows is ... else tensors[name][rows]


def blocks_of(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """The blocks of a mapping's tensor in their order; one in memory is not divided."""
    if not isinstance(tensors, LazyTensors):
        yield tensors[name]
        return
    for rows in row_blocks(tensors.described(name)) if tensors.in_rows(name) else [...]:
        yield tensors.rows(name, rows)
