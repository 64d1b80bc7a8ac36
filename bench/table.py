"""Results as text for a terminal or a log: one table for every benchmark, whose columns are data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mingle.bench.machine import MUCH, STAGES
from mingle.bench.measure import OURS, Row
from mingle.bench.record import Results, timed_rows
from mingle.text import visible

_WIDTH = 130  # of output that no terminal limits
_MARKS = {"met": "green", "missed": "red", "disturbed": "yellow"}
Column = Callable[[Row], str]


def write(results: Results, regressions: list[str] | None = None) -> None:
    """All cases in one table, then what is to be said of them, the targets, and what became slower."""
    console = _console()
    console.print(_table(results, plain=not console.is_terminal))
    lines = list(_notes(results))
    if regressions is not None:
        color = "red" if regressions else "green"
        lines += [(line, color) for line in regressions or ["no regression beyond 10 %"]]
    for text, style in lines:
        console.print(Text(visible(text), style))


def write_lines(lines: Iterable[str]) -> None:
    """Each as it is found."""
    console = _console()
    for line in lines:
        console.print(Text(visible(line, keep="\n")), soft_wrap=True)


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def duration(seconds: float) -> str:
    """With three digits and a unit."""
    units = ("s", 1.0), ("ms", 1e3), ("µs", 1e6)
    unit, factor = next((one for one in units if seconds * one[1] >= 1), units[-1])
    return f"{seconds * factor:.{max(0, 3 - len(str(int(seconds * factor))))}f} {unit}"


def where(results: Results) -> str:
    device = results["device"]
    threads = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    return f"{device['name']}{threads}, torch {results['versions']['torch']}"


def _known(key: str, form: Callable[[Any], str]) -> Column:
    """A column of a figure that not every row has."""
    return lambda row: "–" if row.get(key) is None else form(row[key])


def _spread(prefix: str, form: Callable[[float], str]) -> Column:
    low, high = f"{prefix}p20", f"{prefix}p80"
    return lambda row: f"{form(row[low])} … {form(row[high])}" if low in row else "–"


def _error(row: Row) -> str:
    known = [error for error in (row.get("errors") or {}).values() if error is not None]
    return "bound" if row["status"] == "bound" else f"{max(known):.0e}" if known else "–"


def _stage(name: str) -> Column:
    return _known("stages", lambda stages: duration(stages[name]["median"]))


def _megabytes(key: str, digits: int = 0) -> Column:
    return _known(key, lambda size: f"{size / 1e6:.{digits}f}")


_TIMES = {"median": _known("median", duration), "p20 … p80": _spread("", duration)}
_RATIO, _CALLS = {"× ours": _known("round_ratio", "{:.2f}".format)}, {"calls": _known("repetitions", str)}
_PEAK = {"peak MB": _megabytes("peak_bytes", 1)}
_AT = _known("at", "{:.3g}".format)
_OF_RATIO = {"p20 … p80 of it": _spread("round_ratio_", "{:.2f}".format)}
_EXCESS = {"residual/best − 1": _known("errors", lambda errors: f"{errors['excess']:.0e}")}
_FLOOR, _BEST = _known("floor_fraction", "{:.0%}".format), _known("best_fraction", "{:.0%}".format)
_STEP = _known("step_seconds", lambda steps: duration(steps[-1]))
#: by benchmark
COLUMNS: dict[str, dict[str, Column]] = {
    "kernels": _TIMES | _RATIO | {"of floor": _FLOOR} | _PEAK | {"error": _error},
    "overhead": _TIMES | _RATIO | {"error": _error},
    "breakdown": _TIMES | {"GFLOP": _known("flop", lambda flop: f"{flop / 1e9:.3f}"), "of best": _BEST},
    "experts": _TIMES | _RATIO | _OF_RATIO | _EXCESS | _CALLS,
    "nufilt": _TIMES | _RATIO | {"error": _error} | _CALLS,
    "merges": {stage: _stage(stage) for stage in STAGES}
    | {"whole": _TIMES["median"], **_RATIO, "step, last task": _STEP, **_PEAK}
    | {"accuracy": _known("accuracy", "{:.1f} %".format)},
    "growth": {"at": _AT} | _TIMES | _PEAK,
    "files": {"at": _AT, "wall": _TIMES["median"], "CPU": _known("cpu_seconds", duration)}
    | {"CPU × ours": _RATIO["× ours"], **_PEAK, "not mapped": _megabytes("anonymous_bytes")}
    | {"read": _megabytes("read_bytes"), "written": _megabytes("written_bytes"), "error": _error},
}


def _table(results: Results, plain: bool) -> Table:
    columns, style = COLUMNS[results["benchmark"]], None if plain else box.SIMPLE_HEAD
    out = Table("case", title=Text(visible(where(results))), title_justify="left", box=style, pad_edge=False)
    for name in columns:
        out.add_column(name, justify="right", no_wrap=True)
    out.columns[0].no_wrap = True
    for case in results["cases"]:
        floor = case.get("floor")
        heading = (duration(floor["seconds"]), f"floor: {floor['bound']}") if floor else ()
        out.add_row(Text(visible(case["name"]), "bold"), *heading, style="cyan")
        # of experts the other points of the curves are in the file and the picture
        shown = case["rows"] if "at" in columns else timed_rows(case)
        for row in (row for row in shown if row.get("telling", True)):
            ours, bound = row["name"] in (OURS, f"{OURS} accurate"), row["status"] == "bound"
            label, cells = Text("  " + visible(row["name"])), (column(row) for column in columns.values())
            out.add_row(label, *cells, style="bold" if ours else "dim" if bound else "")
        for row in case["rows"]:
            if row["status"] in ("wrong", "failed"):
                out.add_row(Text("  " + visible(row["name"])), row["status"].upper(), style="bold red")
        out.add_section()
    return out


def _notes(results: Results) -> Iterator[tuple[str, str]]:
    """What ran nowhere, faults, disturbed cases, remarks, and the targets, each with its style."""
    rows = [(case["name"], row) for case in results["cases"] for row in case["rows"]]
    ran = {row["name"] for _, row in rows if row["status"] in ("ok", "bound")}
    absent = {row["name"]: row["reason"] for _, row in rows if row["status"] == "unavailable"}
    yield from ((f"not run: {name}: {reason}", "dim") for name, reason in absent.items() if name not in ran)
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for case, row in rows:
        if "reason" in row and row["status"] != "unavailable":
            reasons.setdefault((case, row["status"], row["reason"]), []).append(row["name"])
    for (case, status, reason), names in reasons.items():
        yield f"{case}: {', '.join(names)}: {status}: {reason}", "dim" if status == "left out" else "red"
    for case in results["cases"]:
        busy = max(one.get("cpus_used_by_others") or 0.0 for one in (case, *case["rows"]))
        if busy > MUCH:
            yield f"{case['name']}: others kept {busy:.1f} CPUs busy; take its times with care", "yellow"
        yield from ((f"{case['name']}: {text}", "") for text in case.get("remarks", ()))
    yield from ((text, "") for text in results.get("remarks", ()))
    yield from map(_target, results["targets"])


def _target(target: dict[str, Any]) -> tuple[str, str]:
    mark = "disturbed" if target.get("disturbed") else "met" if target["met"] else "missed"
    asked, found = target["ratio"], target["found"]
    text = f"≥ {asked:.4g}×, found {found:.2f}×"
    if asked < 1:
        text = f"ours ≤ {1 / asked:.4g}× its time, found {1 / found:.2f}×"
    stage = f", {target['stage']}" if target.get("stage") else ""
    error = f", residual/best − 1 {target['found_error']:.0e}" if "found_error" in target else ""
    pair = f"{target['peer']} against {target['ours']}"
    return f"target {target['case']}{stage}, {pair}: {text}{error}: {mark}", _MARKS[mark]
