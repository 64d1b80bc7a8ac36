"""The rows of a labelled split of a data set on the hub: checked first, read when they are needed."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mingle.io import hub
from mingle.io.files import contained
from mingle.options import OptionError
from mingle.suites.fusionbench.datasets import Source
from mingle.suites.fusionbench.layout import DatasetError, split_files


class Split:
    """The rows of a labelled split, in its Parquet files.

    Args:
        source: the split.
        revisions: the commits to keep to, see `mingle.io.hub`.

    Raises:
        OptionError: pyarrow is not installed.
        CheckpointError: the data set can neither be fetched from the hub nor is it cached.
        DatasetError: no such split, a missing shard, an unreadable file, a missing column, no rows.
    """

    def __init__(self, source: Source, revisions: hub.Revisions | None = None) -> None:
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise OptionError(
                "this suite reads Parquet files: pip install 'mingle-merge[suites]', or pip install pyarrow"
            ) from None
        self.source = source
        folder, names = split_files(source, revisions)
        self._paths = [contained(folder, name) for name in names]
        self._groups: list[tuple[int, int]] = []  # (file, row group) of each group of rows
        self._starts = [0]
        for number, path in enumerate(self._paths):
            try:
                footer = parquet.read_metadata(path)
            except (OSError, arrow.ArrowException) as error:
                raise DatasetError(
                    f"{self.source}: {path} is not a readable Parquet file ({error})"
                ) from None
            self._check_columns(footer.schema.to_arrow_schema().names, path)
            self._groups += [(number, group) for group in range(footer.num_row_groups)]
            for group in range(footer.num_row_groups):
                self._starts.append(self._starts[-1] + footer.row_group(group).num_rows)
        if not len(self):
            raise DatasetError(f"{self.source}: no rows in {', '.join(names)}")
        self._read: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def _check_columns(self, found: Sequence[str], path: Path) -> None:
        self.label = next((name for name in self.source.labels if name in found), self.source.labels[0])
        for name in (*self.source.columns, self.label):
            if name not in found:
                raise DatasetError(
                    f"{self.source}: no column {name!r} in {path.name}; it has {', '.join(found)}"
                )

    def declared_classes(self) -> list[str]:
        """The class names that the data set itself declares.

        Raises:
            DatasetError: it declares none.
        """
        import pyarrow.parquet as parquet

        stored = (parquet.read_schema(self._paths[0]).metadata or {}).get(b"huggingface", b"{}")
        try:
            names = json.loads(stored)["info"]["features"][self.label]["names"]
        except (ValueError, KeyError, TypeError):
            names = None
        if not isinstance(names, list):
            raise DatasetError(f"{self.source}: the column {self.label!r} declares no class names")
        return [str(name) for name in names]

    def labels(self) -> list[Any]:
        """The label of every row.

        Raises:
            DatasetError: a row without one.
        """
        found = [
            label
            for number in range(len(self._groups))
            for label in self._group(number, [self.label])[self.label].to_pylist()
        ]
        if None in found:
            raise DatasetError(f"{self.source}: row {found.index(None)} has no {self.label!r}")
        return found

    def class_labels(self, classes: int) -> torch.Tensor:
        """The labels as class numbers, int64 [n].

        Raises:
            DatasetError: one that is not a whole number from 0 to `classes` − 1.
        """
        found = self.labels()
        for row, label in enumerate(found):
            if not isinstance(label, int) or not 0 <= label < classes:
                known = f"there are {classes} classes, from 0 on"
                raise DatasetError(f"{self.source}: row {row} has {self.label} {label!r}, but {known}")
        return torch.tensor(found, dtype=torch.int64)

    def rows(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """The sample columns of these rows, in this order."""
        numbers = list(numbers)
        found: dict[int, dict[str, Any]] = {}
        for group, members in groupby(
            sorted(set(numbers)), key=lambda row: bisect_right(self._starts, row) - 1
        ):
            ordered = list(members)
            table = self._table(group).take([row - self._starts[group] for row in ordered])
            found |= dict(zip(ordered, table.to_pylist(), strict=True))
        return [found[row] for row in numbers]

    def place(self, row: int) -> str:
        """File and row within it, for messages."""
        group = bisect_right(self._starts, row) - 1
        file = self._groups[group][0]
        first = next(i for i, (number, _) in enumerate(self._groups) if number == file)
        return f"{self._paths[file]}, row {row - self._starts[first]}"

    def _table(self, group: int) -> Any:
        """The samples of a row group, still encoded; the last one is kept, as batches follow each other."""
        if self._read is None or self._read[0] != group:
            self._read = group, self._group(group, self.source.columns)
        return self._read[1]

    def _group(self, group: int, columns: Sequence[str]) -> Any:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        file, inner = self._groups[group]
        try:
            with parquet.ParquetFile(self._paths[file]) as opened:
                return opened.read_row_group(inner, columns=list(columns))
        except (OSError, arrow.ArrowException) as error:
            raise DatasetError(f"{self.source}: {self._paths[file]} is damaged ({error})") from None
