"""The table of a run, and its accuracies as CSV."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mingle.runs.report.numbers import (
    REFERENCES,
    caption,
    has_unknown,
    is_known,
    mean_of,
    mean_std,
    number,
    unknown_of,
)
from mingle.text import csv_cell, markdown_cell, visible

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("method", "ACC (%)", "BWT (%)", "seconds")
#: after ACC, where it was measured in any row
_UNKNOWN = "task unknown (%)"


def table(results: Mapping[str, Any]) -> Table:
    """One row per method: ACC and BWT, mean ± sample standard deviation over orders, and mean seconds.

    ACC where the task has to be found too stands beside ACC if it was measured.  The best merging method is
    in bold.
    """
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(visible(caption(results))))
    for column in _columns(results):
        out.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for reference, rows in itertools.groupby(_rows(results), key=lambda row: row[1]):
        for cells, _, best in rows:
            out.add_row(
                *(Text(visible(cell)) for cell in cells),
                style="dim" if reference else "bold" if best else None,
            )
        out.add_section()
    return out


def markdown_table(results: Mapping[str, Any]) -> str:
    """The same table as GitHub markdown: references in italics, the best merging method in bold."""
    columns = _columns(results)
    rule = "|---" + "|---:" * (len(columns) - 1) + "|"
    lines = [markdown_cell(caption(results)), "", f"| {' | '.join(columns)} |", rule]
    for cells, reference, best in _rows(results):
        mark = "*" if reference else "**" if best else ""
        lines.append(f"| {' | '.join(f'{mark}{markdown_cell(cell)}{mark}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """Write one row per measured accuracy, and beside it that of an unknown task, if there is any.

    Orders count from 0 and steps from 1; ``after`` is the task merged at that step.
    """
    both = has_unknown(results)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["method", "order", "step", "after", "task", "accuracy"]
        writer.writerow([*columns, "task_unknown"] if both else columns)
        for name, result in results["methods"].items():
            unmeasured = [[[None] * len(row) for row in matrix] for matrix in result["matrix"]]
            orders = zip(result["order"], result["matrix"], result.get("unknown", unmeasured), strict=True)
            for order, (tasks, matrix, unknown) in enumerate(orders):
                for step, (after, *rows) in enumerate(zip(tasks, matrix, unknown, strict=True), start=1):
                    for task, value, found in zip(tasks, *rows, strict=True):
                        if is_known(value):
                            cells = [csv_cell(name), order, step, csv_cell(after), csv_cell(task), value]
                            writer.writerow([*cells, _cell(found)] if both else cells)


def _cell(value: float | None) -> float | str:
    """A measured number, or nothing."""
    return value if is_known(value) else ""


def _columns(results: Mapping[str, Any]) -> tuple[str, ...]:
    first, acc, *others = _COLUMNS
    return (first, acc, _UNKNOWN, *others) if has_unknown(results) else _COLUMNS


def _rows(results: Mapping[str, Any]) -> list[tuple[list[str], bool, bool]]:
    """The table's rows, references first: cells, whether a reference, whether the best merging method."""
    methods = {
        name: results["methods"][name]
        for name in sorted(results["methods"], key=lambda name: name not in REFERENCES)
    }
    means = {name: mean_of(result["acc"]) for name, result in methods.items() if name not in REFERENCES}
    best = max(filter(is_known, means.values()), default=None)
    rows = []
    for name, result in methods.items():
        cells = [name, mean_std(result["acc"]), mean_std(result["bwt"]), number(mean_of(result["seconds"]))]
        if has_unknown(results):
            cells.insert(2, mean_std(unknown_of(result)))
        rows.append((cells, name in REFERENCES, name in means and means[name] == best))
    return rows
