"""Pages made of what runs leave behind: a comparison's folder, a table's, or a merged model's.

Whatever is read is held against the form that it should have: these files may come from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError, contained, read_json
from mingle.io.manifest import ANSWERS, MANIFEST, read_manifest, size_of
from mingle.io.schema import Absent, check
from mingle.methods import METHODS
from mingle.runs import course as courses
from mingle.runs import explained, timings
from mingle.runs.report import files
from mingle.runs.report.page.model import Course, Group, Input, Page, Row, Values, curve

_VALUES = [(float, None)]
_SPREAD = {"mean": (float, None), "values": [float]}
_SCORES = ({"acc": (float, None), "bwt": (float, None)}, None)
_CELL = {
    "acc": _SPREAD,
    "bwt": _SPREAD,
    "acc_unknown": Absent(_SPREAD),
    "published": _SCORES,
    "seconds": (float, None),
    "bytes": Absent((float, None)),
    "failed": {str: str},
    "folders": [str],
    "commits": Absent([str]),
    "devices": Absent([str]),
}
_TABLE = {
    "table": str,
    "title": str,
    "orders": int,
    "set": {str: object},
    "seed": Absent(int),
    "versions": Absent({str: (str, None)}),
    "tables": [
        {"protocol": str, "suites": [str], "rows": [{"label": str, "method": str, "cells": {str: _CELL}}]}
    ],
}
_RESULT = {
    "order": [str],
    "failed": (str, None),
    "matrix": [_VALUES],
    "unknown": Absent([_VALUES]),
    "answers": Absent({str: ANSWERS}),
}


def of_comparison(folder: Path) -> Page:
    """The page of a folder that `mingle demo` wrote.

    Raises:
        CheckpointError: see `mingle.runs.report.read`; or a broken merged model.
    """
    results, traces = files.read(folder)
    rows, inputs, base = [], {}, None
    for name, found in results["methods"].items():
        merged = folder / "merged" / name
        manifest = read_manifest(merged) if name in METHODS and (merged / MANIFEST).is_file() else None
        course = _first_course(found, traces.get(name), merged, manifest)
        if manifest is not None:
            inputs[name] = _inputs(manifest, {})
            base = manifest["base"]["sha256"]
        size, count = found.get("bytes"), len(found["order"][0]) if found["order"] else 0
        times = [value for value in found["seconds"] if value is not None]
        rows.append(
            Row(
                label=name,
                method=name,
                acc=found["acc"],
                bwt=found["bwt"],
                unknown=found.get("acc_unknown", ()),
                curves=[curve(matrix) for matrix in found["matrix"]],
                seconds=sum(times) / len(times) if times else None,
                size=None if size is None or not count else size / count,
                course=course,
            )
        )
    orders = max((len(row.acc) for row in rows), default=0)
    facts = [
        ("suite", results["suite"]),
        ("protocol", results["protocol"]),
        ("orders of arrival", str(orders)),
        *([("seed", str(results["seed"]))] if "seed" in results else []),
        *([("base, SHA-256", base)] if base else []),
        *_versions(results),
    ]
    subject = f"{results['suite']}, protocol {results['protocol']}"
    return Page("demo", subject, [Group(subject, rows)], facts, inputs)


def _first_course(
    found: Mapping[str, Any],
    trace: Mapping[str, Any] | None,
    merged: Path,
    manifest: Mapping[str, Any] | None,
) -> Course | None:
    """The course of a method's first order."""
    if not found["order"]:
        return None
    return Course(
        tasks=found["order"][0],
        matrix=found["matrix"][0],
        unknown=found["unknown"][0] if "unknown" in found else (),
        answers=found["answers"][0] if found.get("answers") else {},
        learned={} if trace is None else courses.of_trace(trace),
        explained=_explained(merged, manifest),
        **_told(manifest),
        folder=None if manifest is None else str(merged),
    )


def of_merge(folder: Path) -> Page:
    """The page of a folder that `mingle merge` wrote: of one merged model, or of one for each order.

    Raises:
        CheckpointError: a broken manifest, or what belongs to it.
    """
    rows, inputs, manifests = [], {}, [(place, read_manifest(place)) for place in merged_folders(folder)]
    for place, manifest in manifests:
        path, metadata, method = place / MANIFEST, manifest["metadata"], manifest["method"]
        learned = metadata.get(courses.COURSE, {"tasks": {}})
        courses.check_course(learned, path)
        names = [task["name"] for task in manifest["tasks"]]
        course = Course(
            tasks=names,
            matrix=_padded(manifest["matrix"], len(names)),
            unknown=_padded(manifest.get("unknown", ()), len(names)),
            answers=manifest.get("answers", {}),
            learned=learned,
            explained=_explained(place, manifest),
            **_told(manifest),
            folder=str(place),
        )
        label = method if len(manifests) == 1 else f"{method}, {place.name}"
        taken = timings.read(place)
        inputs[label] = _inputs(manifest, taken)
        times = [taken[name] for name in names if name in taken]
        rows.append(
            Row(
                label=label,
                method=method,
                acc=[_mean(course.matrix[-1:], len(names))],
                bwt=[_transfer(course)],
                unknown=[_mean(course.unknown[-1:], len(names))],
                curves=[curve(course.matrix)],
                seconds=sum(times) if times and len(times) == len(names) else None,
                size=size_of(manifest) / max(len(names), 1),
                course=course,
            )
        )
    first = manifests[0][1]
    metadata, base = first["metadata"], first["base"]
    check(metadata, {"suite": Absent((str, None)), "protocol": Absent(str)}, manifests[0][0] / MANIFEST)
    check(first, {"versions": Absent({str: (str, None)})}, manifests[0][0] / MANIFEST)
    told = [
        ("base", base.get("name")),
        ("base, SHA-256", base["sha256"]),
        ("method", first["method"]),
        ("options", json.dumps(first["options"], ensure_ascii=False)),
        ("suite", metadata.get("suite")),
        ("protocol", metadata.get("protocol")),
        ("seed", str(first["seed"])),
        ("weights", first["dtype"]),
    ]
    facts = [(name, value) for name, value in told if value]
    subject = f"{len(first['tasks'])} tasks by {first['method']}"
    return Page("merge", subject, [Group(subject, rows)], facts + _versions(first), inputs)


def of_table(folder: Path) -> Page:
    """The page of a folder that `mingle reproduce` wrote.

    Raises:
        CheckpointError: a broken ``table.json``, or a broken file of one of its cells.
    """
    path = folder / "table.json"
    summary = read_json(path)
    check(summary, _TABLE, path)
    groups = []
    for part in summary["tables"]:
        for suite in part["suites"]:
            rows = [_table_row(folder, row, suite) for row in part["rows"] if suite in row["cells"]]
            groups.append(Group(f"{suite}, protocol {part['protocol']}", rows))
    options = ", ".join(f"{name}={value}" for name, value in summary["set"].items())
    facts = [
        ("table", f"{summary['table']}: {summary['title']}"),
        ("suites", ", ".join(dict.fromkeys(suite for part in summary["tables"] for suite in part["suites"]))),
        ("protocols", ", ".join(dict.fromkeys(part["protocol"] for part in summary["tables"]))),
        ("orders of arrival", str(summary["orders"])),
        *([("options", options)] if options else []),
        *([("seed", str(summary["seed"]))] if "seed" in summary else []),
        *_versions(summary),
        *[(name, found) for name in ("commits", "devices") if (found := _everywhere(summary, name))],
    ]
    return Page("reproduce", f"{summary['table']}: {summary['title']}", groups, facts)


def _everywhere(summary: Mapping[str, Any], key: str) -> str:
    """What all cells of a table say under a key, each once."""
    cells = [cell for part in summary["tables"] for row in part["rows"] for cell in row["cells"].values()]
    return ", ".join(dict.fromkeys(value for cell in cells for value in cell.get(key, ())))


def _table_row(folder: Path, row: Mapping[str, Any], suite: str) -> Row:
    cell = row["cells"][suite]
    found = [_result(folder, name) for name in cell["folders"]]
    finished = [each for each in found if each is not None]
    course, size = None, cell.get("bytes")
    if finished:
        place, result = finished[0]
        names, trace = result["order"], contained(place, "trace.json")
        learned, recorded = {}, read_json(trace) if trace.is_file() else {}
        if recorded:
            files.check_traces({row["method"]: recorded}, trace)
            learned = courses.of_trace(recorded)
        merged = place / "merger"
        manifest = read_manifest(merged) if (merged / MANIFEST).is_file() else None
        course = Course(
            tasks=names,
            matrix=_padded(result["matrix"], len(names)),
            unknown=_padded(result.get("unknown", ()), len(names)),
            answers=result.get("answers", {}),
            learned=learned,
            explained=_explained(merged, manifest),
            **_told(manifest),
            folder=None if manifest is None else str(merged),
        )
    return Row(
        label=row["label"],
        method=row["method"],
        acc=cell["acc"]["values"],
        bwt=cell["bwt"]["values"],
        unknown=cell.get("acc_unknown", {"values": ()})["values"],
        curves=[curve(_padded(result["matrix"], len(result["order"]))) for _, result in finished],
        seconds=cell["seconds"],
        size=None if size is None or course is None else size / len(course.tasks),
        published={name: value for name, value in (cell["published"] or {}).items() if value is not None},
        course=course,
        failed=[f"order {order}: {reason}" for order, reason in cell["failed"].items()],
    )


def _result(folder: Path, name: str) -> tuple[Path, dict[str, Any]] | None:
    """A finished cell's folder and result; None where it is not finished, diverged, or is not there."""
    place = contained(folder, f"cells/{name}")
    path = place / "result.json"
    if not path.is_file():
        return None
    result = read_json(path)
    check(result, _RESULT, path)
    if result["failed"] is not None:
        return None
    for key in ("matrix", "unknown"):
        if key in result and len(result[key]) != len(result["order"]):
            raise CheckpointError(f"{path}: {key}: expected {len(result['order'])} rows")
    return (place, result) if result["order"] else None


def merged_folders(folder: Path) -> list[Path]:
    """The merged models in a folder: itself, or those of several orders, by their seeds."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = [path for path in folder.glob("order-*") if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _padded(rows: Sequence[Values], count: int) -> list[list[float | None]]:
    """Rows of one length; what is too much is left out."""
    return [([*row, *[None] * count])[:count] for row in rows]


def _mean(rows: Sequence[Values], count: int) -> float | None:
    values = [value for row in rows for value in row if value is not None]
    return sum(values) / count if count and len(values) == count else None


def _transfer(course: Course) -> float | None:
    """BWT, as `mingle.merging.evaluate.Result` has it."""
    lost = [course.lost(task) for task in range(len(course.tasks) - 1)]
    known = [value for value in lost if value is not None]
    if len(known) < len(lost) or not course.tasks:
        return None
    return -sum(known) / len(known) if known else 0.0


def _explained(folder: Path, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if manifest is None else explained.read(folder, manifest)


def _told(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a manifest tells of its tasks in words, by the names of a course's attributes."""
    tasks = [] if manifest is None else manifest["tasks"]
    return {
        "notes": {task["name"]: task["notes"] for task in tasks},
        "skipped": {task["name"]: task["skipped"] for task in tasks if task["skipped"]},
    }


def _inputs(manifest: Mapping[str, Any], seconds: Mapping[str, float]) -> list[Input]:
    noted = manifest["metadata"].get("inputs")
    found = []
    for task in manifest["tasks"]:
        name, tensors = task["name"], task["tensors"] or {}
        model = noted.get(name) if isinstance(noted, dict) else None
        digest = model.get("model") if isinstance(model, dict) else None
        found.append(
            Input(
                task=name,
                model=digest if isinstance(digest, str) else None,
                file=tensors.get("file"),
                digest=tensors.get("sha256"),
                size=tensors.get("bytes"),
                seeds=task["seed_samples"],
                seconds=seconds.get(name),
            )
        )
    return found


def _versions(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return list(_pairs(found.get("versions", {})))


def _pairs(versions: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    for name, version in versions.items():
        if version is not None:
            yield name, version
