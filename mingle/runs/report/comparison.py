"""The tables of `mingle.runs.reproduce`, from its ``table.json``: rows × suites, one table per protocol.

Measured figures stand beside the published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mingle.runs.report.numbers import REFERENCES, number
from mingle.text import markdown_cell, visible

if TYPE_CHECKING:
    from rich.table import Table

#: the most columns that fit side by side: further suites go into a table below
_MOST_COLUMNS = 13
#: in the place of what earlier versions did not measure
_UNMEASURED: dict[str, Any] = {"mean": None, "std": None}


class _Block(NamedTuple):
    """A table to be written: each row with its cells, and for each cell whether it is its suite's best."""

    caption: str
    columns: list[str]
    rows: list[tuple[Mapping[str, Any], list[tuple[str, bool]]]]


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables for a terminal; the best row of every suite is in bold, the reference rows are dim."""
    from rich.table import Table
    from rich.text import Text

    made = []
    for block in _blocks(summary):
        out = Table(title=Text(visible(block.caption)))
        for i, column in enumerate(block.columns):
            heading = visible(column).replace(" ", "\n", 1) if i else column
            out.add_column(Text(heading), justify="right" if i else "left", no_wrap=not i)
        for row, cells in block.rows:
            out.add_row(
                *(Text(visible(text), style="bold" if best else "") for text, best in cells),
                style="dim" if _reference(row) else None,
            )
        made.append(out)
    return made


def markdown(summary: Mapping[str, Any]) -> str:
    """The same tables as GitHub markdown: reference rows in italics, the best row of every suite in bold."""
    lines = []
    for block in _blocks(summary):
        lines += [
            markdown_cell(block.caption),
            "",
            f"| {' | '.join(map(markdown_cell, block.columns))} |",
            "|---" + "|---:" * (len(block.columns) - 1) + "|",
        ]
        for row, cells in block.rows:
            marks = ["**" if best else "*" if _reference(row) else "" for _, best in cells]
            lines.append(
                "| "
                + " | ".join(
                    f"{mark}{markdown_cell(text)}{mark}" for mark, (text, _) in zip(marks, cells, strict=True)
                )
                + " |"
            )
        lines.append("")
    return "\n".join(lines)


def _blocks(summary: Mapping[str, Any]) -> Iterator[_Block]:
    """One block per protocol, or several where the suites need too many columns."""
    for part in summary["tables"]:
        rows = sorted(part["rows"], key=_reference, reverse=True)
        block = _empty(summary, part, rows)
        for suite in part["suites"]:
            columns, cells = _suite(rows, suite)
            if len(block.columns) > 1 and len(block.columns) + len(columns) > _MOST_COLUMNS:
                yield block
                block = _empty(summary, part, rows)
            block.columns.extend(columns)
            for (_, row), own in zip(block.rows, cells, strict=True):
                row.extend(own)
        yield block


def _empty(summary: Mapping[str, Any], part: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> _Block:
    """A block with the rows' labels and no suite yet."""
    count = summary["orders"]
    orders = f"{count} order{'' if count == 1 else 's'}"
    caption = f"{summary['table']} ({summary['title']}), protocol {part['protocol']}, {orders}"
    caption += "".join(f", {name}={value}" for name, value in summary["set"].items())
    if part["protocol"] != "official" and any(
        cell["published"] for row in rows for cell in row["cells"].values()
    ):
        caption += "; the published figures were measured under the official protocol"
    return _Block(caption, ["row"], [(row, [(row["label"], False)]) for row in rows])


def _suite(rows: list[Mapping[str, Any]], suite: str) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """A suite's columns, and its cells by row; with published figures and differences where there are any."""
    cells = [row["cells"].get(suite) for row in rows]
    means = [
        None if cell is None or _reference(row) else cell["acc"]["mean"]
        for row, cell in zip(rows, cells, strict=True)
    ]
    best = max((mean for mean in means if mean is not None), default=None)
    columns: list[str] = []
    texts: list[list[str]] = [[] for _ in rows]
    found = any(cell and cell.get("acc_unknown", _UNMEASURED)["mean"] is not None for cell in cells)
    unknown = [("acc_unknown", "task unknown (%)")] if found else []
    for key, title in (("acc", "ACC (%)"), *unknown, ("bwt", "BWT")):
        columns.append(f"{suite} {title}")
        published = any(
            cell and cell["published"].get(key) is not None for cell in cells if cell and cell["published"]
        )
        columns += [f"{suite} published", f"{suite} difference"] if published else []
        for text, cell in zip(texts, cells, strict=True):
            text.append(_mean_std(cell.get(key, _UNMEASURED)) if cell else "–")
            if published:
                text += [
                    number(cell[what][key]) if cell and cell[what] else "–"
                    for what in ("published", "difference")
                ]
    columns += [f"{suite} seconds", f"{suite} orders"]
    for text, cell in zip(texts, cells, strict=True):
        text += [number(cell["seconds"]), _orders(cell)] if cell else ["–", "–"]
    return columns, [
        [(item, mean is not None and mean == best) for item in text]
        for text, mean in zip(texts, means, strict=True)
    ]


def _reference(row: Mapping[str, Any]) -> bool:
    return row["method"] in REFERENCES


def _orders(cell: Mapping[str, Any]) -> str:
    diverged = f", {len(cell['failed'])} diverged" if cell["failed"] else ""
    return f"{len(cell['finished'])} of {len(cell['folders'])}{diverged}"


def _mean_std(spread: Mapping[str, Any]) -> str:
    return number(spread["mean"]) + ("" if spread["std"] is None else f" ± {number(spread['std'])}")
