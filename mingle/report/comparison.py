"""The tables of `mingle.reproduce`, of what its ``table.json`` holds: rows × suites, one table per protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mingle.report.numbers import REFERENCES, number

if TYPE_CHECKING:
    from rich.table import Table


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """One table per protocol; the best row of every suite is in bold, the reference rows are dim."""
    from rich.table import Table

    made = []
    for part in summary["tables"]:
        out = Table(title=_caption(summary, part))
        for i, column in enumerate(_columns(part)):
            out.add_column(column.replace(" ", "\n", 1) if i else column, justify="right" if i else "left")
        for row, cells in _rows(part):
            out.add_row(*(f"[bold]{text}[/]" if best else text for text, best in cells), style="dim" if _reference(row) else None)
        made.append(out)
    return made


def markdown(summary: Mapping[str, Any]) -> str:
    """The same tables as GitHub markdown: reference rows in italics, the best row of every suite in bold."""
    lines = []
    for part in summary["tables"]:
        columns = _columns(part)
        lines += [_caption(summary, part), "", f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        for row, cells in _rows(part):
            marks = ["**" if best else "*" if _reference(row) else "" for _, best in cells]
            lines.append("| " + " | ".join(f"{mark}{text}{mark}" for mark, (text, _) in zip(marks, cells, strict=True)) + " |")
        lines.append("")
    return "\n".join(lines)


def _caption(summary: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    count = summary["orders"]
    return f"{summary['table']} ({summary['title']}), protocol {part['protocol']}, {count} order{'' if count == 1 else 's'}"


def _columns(part: Mapping[str, Any]) -> list[str]:
    measures = ("ACC (%)", "BWT", "seconds", "orders")
    return ["row", *(f"{suite} {measure}" for suite in part["suites"] for measure in measures)]


def _reference(row: Mapping[str, Any]) -> bool:
    return row["method"] in REFERENCES


def _rows(part: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], list[tuple[str, bool]]]]:
    """Per row its cells, each with whether it is its suite's best; references first."""
    rows = sorted(part["rows"], key=lambda row: not _reference(row))
    best = {
        suite: max((acc for row in rows if not _reference(row) and (acc := _acc(row, suite)) is not None), default=None)
        for suite in part["suites"]
    }
    return [(row, [(row["label"], False), *(cell for suite in part["suites"] for cell in _cells(row, suite, best[suite]))]) for row in rows]


def _acc(row: Mapping[str, Any], suite: str) -> float | None:
    cell = row["cells"].get(suite)
    value: float | None = cell["acc"]["mean"] if cell else None
    return value


def _cells(row: Mapping[str, Any], suite: str, best: float | None) -> list[tuple[str, bool]]:
    cell = row["cells"].get(suite)
    if cell is None:
        return [("–", False)] * 4
    acc = _acc(row, suite)
    is_best = acc is not None and acc == best and not _reference(row)
    diverged = f", {len(cell['failed'])} diverged" if cell["failed"] else ""
    return [
        (_mean_std(cell["acc"]), is_best),
        (_mean_std(cell["bwt"]), is_best),
        (number(cell["seconds"]), is_best),
        (f"{len(cell['finished'])} of {len(cell['folders'])}{diverged}", is_best),
    ]


def _mean_std(spread: Mapping[str, Any]) -> str:
    return number(spread["mean"]) + ("" if spread["std"] is None else f" ± {number(spread['std'])}")
