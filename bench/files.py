"""Merges from files, over size and number of models, beside mergekit: ``python bench/files.py``."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mingle.bench import command, record, table
from mingle.bench.machine import LoadMeter
from mingle.bench.measure import (
    OURS,
    Rounds,
    Row,
    Unavailable,
    exponents,
    interleaved,
    log,
    relative,
    summary,
)
from mingle.bench.merges import checkpoints, commands
from mingle.bench.merges.checkpoints import SIZES
from mingle.bench.merges.commands import MERGEKIT, MERGEKIT_BF16, NOTES, FilesProblem
from mingle.bench.record import CaseResult, Results, case_result

METHOD = """every merge is a command in a process of its own, from its start to its end, imports included, \
in turns; files are in the page cache; medians.  Exponents: slopes of log over log by least squares"""
_SIZES, _MODELS, _FIXED = ("0.06 B", "0.1 B", "0.3 B", "1.1 B"), (2, 3, 4), "0.1 B"
#: who merges with which method, and the sizes of two models; then there are `_MODELS` of size `_FIXED`
_SWEEPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "task-arithmetic": ((OURS, MERGEKIT, MERGEKIT_BF16), _SIZES),
    "ties": ((OURS, MERGEKIT), _SIZES),
    "average": ((OURS,), _SIZES),
    "opcm": ((OURS,), _SIZES[:-1]),  # whose decompositions of the largest take minutes
}
_CPU = torch.device("cpu")
#: seconds of a round of all contenders, from which on there is no second one
_LONG = 60.0
_MEASURED = ("wall_seconds", "cpu_seconds", "peak_bytes", "anonymous_bytes", "read_bytes", "written_bytes")
FITTED = {"cpu_seconds": "CPU time", "peak_bytes": "memory"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sweeps.  Returns 1 where weights did not agree, else 0."""
    parser = command.parser("Time and memory of merges from files, beside mergekit's.")
    parser.add_argument("--rounds", type=int, default=3, help="at most; of what takes minutes there is one")
    args = command.begin(parser, arguments)
    found = run(("0.06 B",) if args.quick else _SIZES, () if args.quick else _MODELS, args.rounds, args.seed)
    if args.out:
        (args.out / "table.md").write_text(table.markdown(found))
    return command.finish(found, args.out, "files", peers_too=True)


def run(sizes: Sequence[str], models: Sequence[int], rounds: int, seed: int = 0) -> Results:
    """Every method over the sizes, with two models, and over the numbers of models."""
    began, load = time.monotonic(), LoadMeter()
    rows: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for size, count in sorted({(size, 2) for size in sizes} | {(_FIXED, count) for count in models}):
        with tempfile.TemporaryDirectory(prefix="mingle-files-") as folder:
            log.info("%s, %d models", size, count)
            rows[size, count] = _point(Path(folder), size, count, rounds, seed)
    found = []
    for method, (_, own) in _SWEEPS.items():
        points = {SIZES[n].parameters() / 1e9: rows[n, 2][method] for n in sizes if n in own}
        found.append(_sweep(method, "10⁹ parameters", points))
    for method in _SWEEPS if models else ():
        found.append(_sweep(method, "models", {count: rows[_FIXED, count][method] for count in models}))
    title = f"{checkpoints.DATA}; two models, and where their number varies {_FIXED}"
    about: dict[str, Any] = {"title": "Merges from files", "method": METHOD, "data": title, "notes": NOTES}
    about |= {"mergekit": commands.mergekit_version(), "cpus_used_by_others": load.others()}
    return record.envelope("files", _CPU, seed, found, (), began, **about)


def _point(folder: Path, name: str, count: int, rounds: int, seed: int) -> dict[str, list[Row]]:
    """By method a row of each contender, for one size and number of models."""
    size = SIZES[name]
    base = checkpoints.write(folder / "base", size)
    models = [checkpoints.write(folder / f"model{i}", size, i) for i in range(count)]
    found = {}
    for method in (method for method, (_, sizes) in _SWEEPS.items() if name in sizes):
        problem = FilesProblem(method, base, models)
        found[method] = _compared(problem, _SWEEPS[method][0], folder / "out", rounds, seed)
    return found


def _compared(problem: FilesProblem, names: Sequence[str], folder: Path, rounds: int, seed: int) -> list[Row]:
    """All once, and compared with ours; then those that are right again in turns, unless that takes long."""
    began, rows, runs = time.monotonic(), [], {}
    for name in names:
        row: Row = {"name": name, "status": "ok", "note": NOTES[name]}
        rows.append(row)
        try:
            runs[name] = [_once(name, problem, folder)]
            if name != OURS and OURS in runs:
                row |= commands.agreement(name, problem, folder / OURS, folder / name)
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
    found = commands.took(commands.command(name, problem, folder / name))
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
    facts = {"method": method, "options": commands.METHODS[method], "swept": swept, "values": list(points)}
    return case_result(f"{method}, {swept}", f"{method}: {swept}", facts, rows, exponents=fitted)


if __name__ == "__main__":
    raise SystemExit(main())
