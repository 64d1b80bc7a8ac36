"""Time and memory of merges from files, over size and number of models, beside mergekit on the same files.

``python examples/studies/merges_from_files.py --out FOLDER`` takes one to two hours on two cores, and 20 GB
of disk; ``--quick`` shows whether it works.  mergekit pins other packages, and has an environment of its own:
its ``mergekit-yaml`` is on the path, or named by ``MERGEKIT_YAML``.  Without it only ours is measured.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import random_llamas
import torch
from merge_commands import (
    MERGEKIT,
    MERGEKIT_BF16,
    METHODS,
    NOTES,
    OURS_TWICE,
    FilesProblem,
    agreement,
    command,
    mergekit_version,
    reading_rate,
    took,
)  # fmt: skip
from random_llamas import SIZES
from swept import draw, exponents

from mingle.bench import command as shared
from mingle.bench import record, table
from mingle.bench.machine import LoadMeter
from mingle.bench.measure import OURS, Rounds, Row, Unavailable, interleaved, log, relative, summary
from mingle.bench.record import CaseResult, Results, case_result
from mingle.io.files import write_json

METHOD = """every merge is a command in a process of its own, from its start to its end, imports included, \
in turns; files are in the page cache; medians.  Exponents: slopes of log over log by least squares"""
_SIZES, _MODELS, _FIXED = ("0.06 B", "0.15 B", "0.3 B", "0.6 B"), (2, 4, 8), "0.06 B"
#: who merges with which method, and the sizes of two models; then there are `_MODELS` of size `_FIXED`
_SWEEPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "task-arithmetic": ((OURS, OURS_TWICE, MERGEKIT, MERGEKIT_BF16), tuple(SIZES)),
    "ties": ((OURS, OURS_TWICE, MERGEKIT), tuple(SIZES)),
    "average": ((OURS,), tuple(SIZES)),
    "opcm": ((OURS,), _SIZES[:2]),  # whose decompositions take minutes of larger ones
}
_CPU = torch.device("cpu")
#: seconds of a round of all contenders, from which on there is no second one
_LONG = 60.0
_MEASURED = ("wall_seconds", "cpu_seconds", "peak_bytes", "anonymous_bytes", "read_bytes", "written_bytes")
#: by size and number of models and by method, a row of each contender
Rows = Mapping[tuple[str, int], Mapping[str, Sequence[Row]]]
FITTED = ("cpu_seconds", "peak_bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sweeps.  Returns 1 where weights did not agree, else 0."""
    parser = shared.parser("Time and memory of merges from files, beside mergekit's.")
    parser.add_argument("--rounds", type=int, default=3, help="at most; of what takes minutes there is one")
    several: dict[str, Any] = dict(nargs="*")
    parser.add_argument("--sizes", choices=SIZES, default=_SIZES, help="of two models", **several)
    parser.add_argument("--methods", choices=_SWEEPS, help="these alone, of all sizes", **several)
    parser.add_argument("--models", type=int, choices=_MODELS, default=_MODELS, help="how many", **several)
    args = shared.begin(parser, arguments)
    if args.gpu:
        parser.error("--gpu: merges from files compute on the CPU")
    points = [(size, 2) for size in args.sizes] + [(_FIXED, count) for count in args.models]
    for found in run(points[:1] if args.quick else points, args.methods, args.rounds, args.seed):
        if args.out:
            write_json(args.out / "files.json", found)
            (args.out / "files.md").write_text(markdown(found))
            draw(found, args.out / "files.png")
    return shared.finish(found, args.out, "files", peers_too=True)


def run(
    points: Sequence[tuple[str, int]], methods: Sequence[str] | None, rounds: int, seed: int = 0
) -> Iterator[Results]:
    """Methods, by default those that a size is for, with models of these sizes and numbers.

    After each point all that is known.
    """
    began, load = time.monotonic(), LoadMeter()
    rows: dict[tuple[str, int], dict[str, list[Row]]] = {}
    rates: list[float] = []
    for size, count in dict.fromkeys(points):
        with tempfile.TemporaryDirectory(prefix="mingle-files-") as folder:
            log.info("%s, %d models", size, count)
            rows[size, count], rate = _point(Path(folder), size, count, methods, rounds, seed)
            rates.append(rate)
        more = {"cpus_used_by_others": load.others(), "disk_read_bytes_per_second": statistics.median(rates)}
        yield _results(rows, seed, began, **more)


def _results(rows: Rows, seed: int, began: float, **more: Any) -> Results:
    over_size: list[CaseResult] = []
    over_models: list[CaseResult] = []
    for method in _SWEEPS:
        known = {point: one[method] for point, one in rows.items() if method in one}
        sized = {SIZES[size].parameters() / 1e9: one for (size, count), one in known.items() if count == 2}
        counted = {count: one for (size, count), one in known.items() if size == _FIXED}
        over_size += [_sweep(method, "10⁹ parameters", sized)] if sized else []
        over_models += [_sweep(method, "models", counted)] if len(counted) > 1 else []
    found = over_size + over_models
    data = f"{random_llamas.DATA}; two models, and where their number varies {_FIXED}"
    about: dict[str, Any] = {"title": "Merges from files", "method": METHOD, "data": data, "notes": NOTES}
    about |= {"mergekit": mergekit_version(), **more}
    return record.envelope("files", _CPU, seed, found, (), began, **about)


def _point(
    folder: Path, name: str, count: int, methods: Sequence[str] | None, rounds: int, seed: int
) -> tuple[dict[str, list[Row]], float]:
    """By method a row of each contender, for one size and number of models; and the disk's reading rate."""
    size = SIZES[name]
    base = random_llamas.write(folder / "base", size)
    models = [random_llamas.write(folder / f"model{i}", size, i) for i in range(count)]
    found, rate = {}, reading_rate(base)
    for method in methods or [method for method, (_, sizes) in _SWEEPS.items() if name in sizes]:
        problem = FilesProblem(method, base, models)
        found[method] = _compared(problem, _SWEEPS[method][0], folder / "out", rounds, seed)
    return found, rate


def _compared(problem: FilesProblem, names: Sequence[str], folder: Path, rounds: int, seed: int) -> list[Row]:
    """All once, and compared with ours; then those that are right again in turns, unless that takes long."""
    began, rows, runs = time.monotonic(), [], {}
    for name in names:
        row: Row = {"name": name, "status": "ok", "note": NOTES[name]}
        rows.append(row)
        try:
            runs[name] = [_once(name, problem, folder)]
            if name != OURS and OURS in runs:
                row |= agreement(name, problem, folder / OURS, folder / name)
        except Unavailable as reason:
            row |= {"status": "unavailable", "reason": str(reason)}
        except RuntimeError as error:
            row |= {"status": "failed", "reason": str(error)}
        if row["status"] == "wrong":
            log.warning("%s is WRONG: %s", name, row["reason"])
            del runs[name]
    if rounds > 1 and time.monotonic() - began < _LONG:
        steps = {
            name: partial(lambda name: runs[name].append(_once(name, problem, folder)), name) for name in runs
        }
        interleaved(steps, _CPU, Rounds(fewest=rounds - 1, most=rounds - 1, warm_ups=0, collect=True), seed)
    shutil.rmtree(folder)
    for row in (row for row in rows if row["name"] in runs and OURS in runs):
        series = {key: [run[key] for run in runs[row["name"]]] for key in _MEASURED}
        row |= summary(series["wall_seconds"]) | {
            key: statistics.median(each) for key, each in series.items()
        }
        row |= relative(series["cpu_seconds"], [run["cpu_seconds"] for run in runs[OURS]])
        row |= {"rounds": runs[row["name"]]}
    return rows


def _once(name: str, problem: FilesProblem, folder: Path) -> Row:
    """One merge into a new folder."""
    shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    found = took(command(name, problem, folder / name))
    log.info("%s, %s: %.1f s", problem.method, name, found["wall_seconds"])
    return found


def _sweep(method: str, swept: str, points: Mapping[float, Sequence[Row]]) -> CaseResult:
    """A row for every point and contender, and the exponents of each contender."""
    rows = [{**row, "at": at} for at, those in points.items() for row in those]
    fitted: dict[str, Any] = {}
    for name in dict.fromkeys(row["name"] for row in rows if "median" in row):
        own = [row for row in rows if row["name"] == name and "median" in row]
        costs = {key: [row[key] for row in own] for key in FITTED} if len(own) > 1 else {}
        fitted[name] = {key: exponents([row["at"] for row in own], those) for key, those in costs.items()}
    facts = {"method": method, "options": METHODS[method], "swept": swept, "values": list(points)}
    return case_result(f"{method}, {swept}", f"{method}: {swept}", facts, rows, exponents=fitted)


def markdown(results: Results) -> str:
    """All rows with times as a table for a page, and what is said of it."""
    columns = table.COLUMNS[results["benchmark"]]
    lines = [f"| case | | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for case in results["cases"]:
        rows = [row for row in case["rows"] if "median" in row]
        lines += [
            f"| {case['title']} | {row['name']} | {' | '.join(f(row) for f in columns.values())} |"
            for row in rows
        ]
    return "\n".join([*lines, "", f"{table.where(results)}, {results['date'][:10]}", ""])


if __name__ == "__main__":
    raise SystemExit(main())
