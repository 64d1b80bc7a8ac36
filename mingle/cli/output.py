"""The console, and how commands print results."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from mingle.merging.evaluate import Result

console = Console()


def result_table(result: Result) -> Table:
    """Every task's accuracy, when it was merged and now."""
    title = f"ACC {percent(result.acc)}, BWT {points(result.bwt)}"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    table.add_column("when merged", justify="right")
    table.add_column("now", justify="right")
    for j, name in enumerate(result.tasks):
        table.add_row(name, percent(result.matrix[j][j]), percent(result.matrix[-1][j]))
    return table


def percent(value: float | None) -> str:
    """With one decimal; a dash for a value that was not measured."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f} %"


def points(value: float) -> str:
    """With one decimal and a sign; a dash for a value that was not measured."""
    return "–" if math.isnan(value) else f"{value:+.1f}"
