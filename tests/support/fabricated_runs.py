"""Folders as commands leave them, with numbers chosen by hand and names of any kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mingle.runs import explained

TASKS = ["digits", "letters", "rings", "stripes"]
LAYERS = [f"encoder.layers.{block}.{leaf}" for block in range(2) for leaf in ("self_attn.q_proj", "mlp.fc1")]
#: names that mean something to a browser, a terminal or a reader's eye
HOSTILE = [
    "<script>document.title='taken'</script>",
    "[b]bold[/b] & &amp; <b>",
    '"quoted\' onmouseover=alert(1) x="',
    "</style></script><img src=x onerror=alert(1)>",
    "turned\u202eround\u200f",
    "{{ 7 * 7 }} {% raw %} ${1}",
    "long" * 2500,
]


def triangle(count: int, first: float, drop: float) -> list[list[float | None]]:
    """Accuracies that are `first` when a task is merged, and fall by `drop` at every later merge."""
    return [[first - drop * (i - j) if j <= i else None for j in range(count)] for i in range(count)]


def answers(names: Sequence[str]) -> dict[str, Any]:
    """Of 100 samples of a task 80 are found, and 20 go to the task before it; two classes are mixed up."""
    found = {}
    for place, name in enumerate(names):
        taken = dict.fromkeys(names, 0)
        taken[names[place - 1]] += 20
        taken[name] += 80
        confused = [{"wanted": f"class of {name}", "given": "other", "count": 7, "samples": 25}]
        found[name] = {"taken": taken, "confused": confused}
    return found


def trace(names: Sequence[str], layers: Sequence[str] = LAYERS, steps: int = 6) -> dict[str, Any]:
    """Of a method that adapted: the gate of a task's own expert is 1, those of others −0.25."""
    rising = [0.001 * 2**step for step in range(steps)]
    falling = [1 - value for value in rising]
    gates = [[1.0 if task == expert else -0.25 for expert in range(len(names))] for task in range(len(names))]
    return {
        "order": list(names),
        "layers": list(layers),
        "loss": [[2.0 - 0.1 * step for step in range(steps)]] * len(names),
        "interference": [{}, *[dict.fromkeys(layers, rising)] * (len(names) - 1)],
        "strength": [{}, *[dict.fromkeys(layers, falling)] * (len(names) - 1)],
        "gates": [[row] * len(layers) for row in gates],
    }


def comparison(
    folder: Path,
    names: Sequence[str],
    methods: Sequence[str] = ("individual", "average", "mingle"),
    **more: Any,
) -> Path:
    """A folder of `mingle demo`; `individual` has 95 %, `average` loses 6 points a merge, others 1."""
    count, rows, traces = len(names), {}, {}
    for method in methods:
        first, drop = {"individual": (95.0, 0.0), "average": (70.0, 6.0)}.get(method, (93.0, 1.0))
        matrix = triangle(count, first, drop)
        acc = sum(value or 0.0 for value in matrix[-1]) / count
        rows[method] = {
            "acc": [acc],
            "bwt": [-drop * count / 2],
            "acc_unknown": [acc - 20],
            "seconds": [1.25],
            "order": [list(names)],
            "matrix": [matrix],
            "unknown": [triangle(count, first - 20, drop)],
            "answers": [answers(names)],
            "bytes": 3_000_000,
        }
        if method.startswith("mingle"):
            traces[method] = trace(names, **more)
    results = {"suite": "suite [x] <i>", "protocol": "strict", "seed": 0, "versions": {"mingle": "1.2.3"}}
    return _written(folder, {"results.json": results | {"methods": rows}, "traces.json": traces})


def merged(folder: Path, names: Sequence[str], method: str = "mingle", **changes: Any) -> Path:
    """A folder of `mingle merge`, without its tensors; `changes` go into the manifest."""
    count, digest = len(names), "ab" * 32
    series = {
        "steps": 6,
        "loss": [2.0, 1.0],
        "interference": {"b0": [0.01, 0.1]},
        "strength": {"b0": [1.0, 0.9]},
    }
    metadata = {
        "suite": "own images",
        "protocol": "strict",
        "inputs": {name: {"model": "cd" * 32} for name in names},
        "course": {"tasks": dict.fromkeys(names, series)},
    }
    tasks = [
        {
            "name": name,
            "seed_samples": 50,
            "skipped": None,
            "notes": [],
            "tensors": {
                "file": f"tasks/{place:03d}-x-{'0' * 12}.safetensors",
                "bytes": 1_500_000,
                "sha256": digest,
            },
        }
        for place, name in enumerate(names)
    ]
    manifest = {
        "format": "mingle-merge",
        "format_version": 1,
        "method": method,
        "task_type": "clip-vision",
        "seed": 0,
        "dtype": "float32",
        "options": {"rank": 64},
        "tasks": tasks,
        "matrix": [row[: i + 1] for i, row in enumerate(triangle(count, 93.0, 1.0))],
        "metadata": metadata,
        "base": {"sha256": digest, "folder": None, "name": "a/base"},
        "state": None,
        "versions": {"mingle": "1.2.3", "torch": "4.5.6"},
    }
    return _written(folder, {"manifest.json": manifest | changes})


def table(
    folder: Path, suites: Sequence[str], methods: Sequence[str], names: Sequence[str], **cell: Any
) -> Path:
    """A folder of `mingle reproduce`, one order; `cell` goes into every cell of the table."""
    files: dict[str, Any] = {}
    rows = []
    for method in methods:
        cells = {}
        for place, suite in enumerate(suites):
            name = f"{place}-{method}"
            matrix = triangle(len(names), 93.0, 1.0)
            values = [sum(value or 0.0 for value in matrix[-1]) / len(names)]
            spread = {"mean": values[0], "std": None, "values": values}
            cells[suite] = {
                "acc": spread,
                "bwt": spread | {"values": [-1.0]},
                "published": {"acc": 80.5, "bwt": -2.0},
                "difference": None,
                "seconds": 2.5,
                "bytes": 4_000.0,
                "failed": {},
                "folders": [name],
            } | cell
            result = {"order": list(names), "failed": None, "answers": answers(names)}
            result["matrix"] = [row[: i + 1] for i, row in enumerate(matrix)]
            files[f"cells/{name}/result.json"] = result
            files[f"cells/{name}/trace.json"] = trace(names) if method.startswith("mingle") else {}
        rows.append({"label": f"{method} γ=1", "method": method, "cells": cells})
    part = {"protocol": "strict", "suites": list(suites), "rows": rows}
    summary = {"table": "main", "title": "Main results", "orders": 1, "set": {"k": 3}, "tables": [part]}
    return _written(folder, files | {"table.json": summary})


def _written(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def explanation(folder: Path, **changes: Any) -> None:
    """An ``explain.json`` of the merge in the folder, as it is now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tasks = [
        {
            "task": name,
            "start": "fine-tuned",
            "before": 95.0,
            "changes": {"rank": -4.0, "newer tasks": 1.0},
            "merged": 92.0,
        }
        for name in TASKS
    ]
    about = {"merge": explained._digest(manifest), "suite": "own <images>", "steps": ["rank"], "tasks": tasks}
    (folder / "explain.json").write_text(json.dumps(about | changes))
