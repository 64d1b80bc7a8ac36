"""The table of a run, and its accuracies as CSV."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mingle.runs.report.numbers import REFERENCES, caption, is_known, mean_of, mean_std, number
from mingle.text import csv_cell, markdown_cell, visible

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("method", "ACC (%)", "BWT (%)", "seconds")


def table(results: Mapping[str, Any]) -> Table:
    """One row per method: ACC and BWT, mean ± sample standard deviation over orders, and mean seconds.

    The best merging method is in bold.
    """
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(visible(caption(results))))
    for column in _COLUMNS:
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
    lines = [markdown_cell(caption(results)), "", f"| {' | '.join(_COLUMNS)} |", "|---|---:|---:|---:|"]
    for cells, reference, best in _rows(results):
        mark = "*" if reference else "**" if best else ""
        lines.append(f"| {' | '.join(f'{mark}{markdown_cell(cell)}{mark}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """Write one row per measured accuracy.

    Orders count from 0 and steps from 1; ``after`` is the task merged at that step.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "order", "step", "after", "task", "accuracy"])
        for name, result in results["methods"].items():
            for order, (tasks, matrix) in enumerate(zip(result["order"], result["matrix"], strict=True)):
                for step, (after, row) in enumerate(zip(tasks, matrix, strict=True), start=1):
                    cells = zip(tasks, row, strict=True)
                    writer.writerows(
                        [csv_cell(name), order, step, csv_cell(after), csv_cell(task), value]
                        for task, value in cells
                        if is_known(value)
                    )


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
        rows.append((cells, name in REFERENCES, name in means and means[name] == best))
    return rows
