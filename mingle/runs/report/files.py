"""The JSON files of a run folder, read back; what the report is made from fits together, or is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError, read_json
from mingle.io.manifest import ANSWERS
from mingle.io.schema import Absent, check

_NUMBERS = [(float, None)]
_RESULTS = {
    "suite": str,
    "protocol": str,
    "seed": Absent(int),
    "versions": Absent({str: (str, None)}),
    "methods": {
        str: {
            "acc": _NUMBERS,
            "bwt": _NUMBERS,
            "seconds": _NUMBERS,
            "order": [[str]],
            "matrix": [[_NUMBERS]],
            "acc_unknown": Absent(_NUMBERS),
            "unknown": Absent([[_NUMBERS]]),
            "answers": Absent([{str: ANSWERS}]),
            "bytes": Absent((int, None)),
        }
    },
}
_SERIES = [{str: _NUMBERS}]
_TRACE = {
    "order": [str],
    "layers": [str],
    "loss": [_NUMBERS],
    "interference": _SERIES,
    "strength": _SERIES,
    "gates": [[_NUMBERS]],
}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``results.json`` and ``traces.json`` of a folder; `mingle.runs.report` describes both.

    Raises:
        CheckpointError: a missing or broken file, or one of another form; the message names file and key.
    """
    results, traces = (read_json(folder / name) for name in ("results.json", "traces.json"))
    check(results, _RESULTS, folder / "results.json")
    for name, rows in results["methods"].items():
        for fault in _row_faults(rows):
            raise CheckpointError(f"{folder / 'results.json'}: methods.{name}: {fault}")
    check_traces(traces, folder / "traces.json")
    return results, traces


def check_traces(traces: Any, file: Path) -> None:
    """Raise `CheckpointError`, which names file and key, for what are not traces by the names of methods."""
    check(traces, {str: _TRACE}, file)
    for name, trace in traces.items():
        for fault in _trace_faults(trace):
            raise CheckpointError(f"{file}: {name}: {fault}")


def _row_faults(rows: Mapping[str, Any]) -> Iterator[str]:
    orders, tasks = len(rows["order"]), len(rows["order"][0]) if rows["order"] else 0
    for key in ("acc", "bwt", "seconds", "matrix", "acc_unknown", "unknown", "answers"):
        if key in rows and len(rows[key]) != orders:
            yield f"{key}: expected one value for each of {orders} orders, found {len(rows[key])}"
    for i, names in enumerate(rows["order"]):
        if len(names) != tasks or not names:
            yield f"order[{i}]: expected {tasks or 'some'} tasks, as in the first order, found {len(names)}"
    for key in ("matrix", "unknown"):
        for i, matrix in enumerate(rows.get(key, ())):
            if [len(row) for row in matrix] != [tasks] * tasks:
                yield f"{key}[{i}]: expected {tasks} rows of {tasks} values"


def _trace_faults(trace: Mapping[str, Any]) -> Iterator[str]:
    tasks, layers = len(trace["order"]), len(trace["layers"])
    for key in ("loss", "interference", "strength"):
        if len(trace[key]) != tasks:
            yield f"{key}: expected one entry for each of {tasks} tasks, found {len(trace[key])}"
    for key in ("interference", "strength"):
        for i, (series, loss) in enumerate(zip(trace[key], trace["loss"], strict=True)):
            for layer, values in series.items():
                if layer not in trace["layers"] or len(values) != len(loss):
                    yield f"{key}[{i}]: {layer!r}: expected a layer, and {len(loss)} values, as many as steps"
    experts = {len(row) for gates in trace["gates"] for row in gates}
    if trace["gates"] and ([len(gates) for gates in trace["gates"]] != [layers] * tasks or len(experts) != 1):
        yield f"gates: expected {tasks} × {layers} rows of one length"
