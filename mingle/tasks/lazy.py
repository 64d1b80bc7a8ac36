"""Inputs made batch by batch: all test images of a large task, decoded, would not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch


class LazyInputs(Mapping[str, torch.Tensor]):
    """Model inputs by name, made from their samples whenever they are asked for, and not kept.

    Args:
        names: the inputs' names.
        read: sample numbers → their inputs, one row per sample.
        rows: int64 [n], the numbers of the samples in question.
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[list[int]], Mapping[str, torch.Tensor]],
        rows: torch.Tensor,
    ) -> None:
        self.names, self.read, self.rows = tuple(names), read, rows

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.made()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: torch.Tensor | slice) -> LazyInputs:
        """The samples at `index`, yet to be made."""
        return LazyInputs(self.names, self.read, self.rows[index])

    def made(self) -> Mapping[str, torch.Tensor]:
        """The inputs of all samples in question."""
        return self.read(self.rows.tolist())
