"""The finished cells of a table together, as plain data: ``table.json``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mingle.io import provenance
from mingle.io.files import read_json, write_json, write_text
from mingle.runs.report import comparison, page, sweeps
from mingle.runs.report.files import check_traces
from mingle.runs.reproduce.cells import TRACE
from mingle.runs.reproduce.expected import expected
from mingle.runs.reproduce.paper import Scores
from mingle.runs.reproduce.request import Entry, TablePlan

_MEASURES = ("acc", "bwt")


def gather(plan: TablePlan, out: Path) -> dict[str, Any]:
    """The table, from those of its cells that are finished.

    Returns:
        ``table``, ``title``, ``axis`` (the swept quantity or None), ``orders`` (how many were asked for),
        ``set`` (options asked for), ``samples_per_class``, ``seed``, ``versions`` and ``tables``: for each
        protocol its name, the ``suites`` and ``rows``.  A row has ``label``, ``method``, ``options``,
        ``series`` and ``value`` (of a sweep) and, under ``cells`` and the suite's name, ``acc``, ``bwt``,
        ``acc_unknown`` ({mean, std, values} in per cent and points, over the finished orders; std is None for
        one order, and of what was not measured there are no values),
        ``published`` and ``difference`` ({acc, bwt}, or None where nothing was published), ``seconds`` (mean,
        of merging), ``bytes`` (mean, of what is kept beside the base), ``finished`` (order seeds), ``failed``
        (order seed → message), ``commits`` and ``devices`` (of the code and the machines that measured) and
        ``folders``.
    """
    protocols: dict[str, dict[str, Any]] = {}
    for entry in plan.entries:
        table = protocols.setdefault(entry.protocol, {"protocol": entry.protocol, "suites": [], "rows": {}})
        if entry.suite not in table["suites"]:
            table["suites"].append(entry.suite)
        row = table["rows"].setdefault(entry.row.label, _row(entry))
        row["cells"][entry.suite] = _cell(
            entry, expected(plan.request.table, entry.row, entry.suite), out / "cells"
        )
    return {
        "table": plan.request.table,
        "title": plan.table.title,
        "axis": plan.table.axis,
        "orders": plan.request.orders,
        "set": dict(plan.request.options),
        "samples_per_class": plan.request.samples_per_class,
        "seed": plan.request.seed,
        "versions": provenance.versions(),
        "tables": [table | {"rows": list(table["rows"].values())} for table in protocols.values()],
    }


def write(plan: TablePlan, out: Path) -> dict[str, Any]:
    """Write ``table.json``, ``table.md``, plots and ``report.html`` of the finished cells to `out`.

    Returns:
        The table.
    """
    summary, traces = gather(plan, out), _traces(plan, out / "cells")
    write_json(out / "table.json", summary)
    write_text(out / "table.md", comparison.markdown(summary))
    sweeps.write_plots(summary, traces, out)
    page.write(out)
    return summary


def _traces(plan: TablePlan, cells: Path) -> dict[str, Any]:
    """Protocol → suite → row label → the ``trace.json`` of the first order, where there is one."""
    traces: dict[str, Any] = {}
    for entry in plan.entries:
        path = cells / entry.cells[0].folder_name / TRACE
        if path.exists():
            trace = read_json(path)
            if trace != {}:  # of a method that does not adapt
                check_traces({entry.row.method: trace}, path)
            traces.setdefault(entry.protocol, {}).setdefault(entry.suite, {})[entry.row.label] = trace
    return traces


def _row(entry: Entry) -> dict[str, Any]:
    row = entry.row
    fixed = dict(row.options) | (
        {"samples_per_class": row.samples_per_class} if row.samples_per_class else {}
    )
    return {
        "label": row.label,
        "method": row.method,
        "options": fixed,
        "series": row.series,
        "value": row.value,
        "cells": {},
    }


def _cell(entry: Entry, published: Scores | None, cells: Path) -> dict[str, Any]:
    results = {cell.order: result for cell in entry.cells if (result := cell.result(cells)) is not None}
    measured = {order: result for order, result in results.items() if result["failed"] is None}
    seconds = [result["seconds"] for result in measured.values()]
    sizes = [size for result in measured.values() if (size := result.get("bytes")) is not None]
    spread = {
        key: _spread([result[key] for result in measured.values() if result.get(key) is not None])
        for key in (*_MEASURES, "acc_unknown")
    }
    figures = None if published is None else dict(zip(_MEASURES, published, strict=True))
    return {
        **spread,
        "published": figures,
        "difference": figures and {key: _difference(spread[key]["mean"], figures[key]) for key in _MEASURES},
        "seconds": statistics.fmean(seconds) if seconds else None,
        "bytes": statistics.fmean(sizes) if sizes else None,
        "finished": list(measured),
        "failed": {
            str(order): result["failed"] for order, result in results.items() if result["failed"] is not None
        },
        "commits": sorted({commit for result in results.values() if (commit := result.get("commit"))}),
        "devices": sorted({result["device"]["name"] for result in results.values() if "device" in result}),
        "folders": [cell.folder_name for cell in entry.cells],
    }


def _difference(measured: float | None, published: float | None) -> float | None:
    return None if measured is None or published is None else measured - published


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation, None where there are too few values."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }
