"""The one form of every result, as plain data.

    envelope  format, format_version, benchmark, date, device, versions, commit, float32_matmul_precision,
              seed, seconds, cases, targets, and what a benchmark says of the whole run
    case      name, title, facts (what was computed), rows, and where known cpus_used_by_others, remarks
              (sentences for people), and what this benchmark alone says of a case
    row       name and status; ``errors`` and ``tolerance`` where it was checked; a ``reason`` where it has
              no times, else ``median``, ``p20``, ``p80``, ``repetitions``, ``seconds`` (of every round),
              ``ratio`` (of the medians to ours), ``round_ratio`` with its percentiles (of each round to
              ours); ``peak_bytes``, ``note``, and what is said of this row alone

A status: ``ok``, ``bound`` (of another function), ``wrong``, ``failed``, ``unavailable``, ``left out``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mingle.bench import judge
from mingle.bench.judge import Target
from mingle.bench.measure import Row
from mingle.io.files import CheckpointError, read_json
from mingle.io.provenance import describe
from mingle.io.schema import check

CaseResult = dict[str, Any]
Results = dict[str, Any]
FORMAT, FORMAT_VERSION = "mingle-bench", 2


def envelope(
    benchmark: str, device: torch.device, seed: int, cases: Sequence[CaseResult], asked: Iterable[Target],
    began: float, **facts: Any,
) -> Results:  # fmt: skip
    """A whole result, measured just now, since `began` by `time.monotonic`, and held against the targets."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    form = {"format": FORMAT, "format_version": FORMAT_VERSION, "benchmark": benchmark, "date": date}
    judged = {"cases": list(cases), "targets": judge.targets(cases, asked, device.type)}
    return form | describe(device) | {"seed": seed, "seconds": time.monotonic() - began} | facts | judged


def case_result(name: str, title: str, facts: Any, rows: Sequence[Row], **more: Any) -> CaseResult:
    return {"name": name, "title": title, "facts": facts, "rows": list(rows), **more}


def timed_rows(case: Mapping[str, Any]) -> list[Row]:
    """From fastest to slowest."""
    return sorted((row for row in case["rows"] if "median" in row), key=lambda row: row["median"])


def read(path: Path) -> Results:
    """Results from a file.

    Raises:
        CheckpointError: it holds something else, or another version of the format.
    """
    found: Results = read_json(path)
    form = (found.get("format"), found.get("format_version")) if isinstance(found, dict) else None
    if form != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{path}: not the results of this benchmark, format version {FORMAT_VERSION}")
    check(found, {"cases": [{"name": str, "rows": [{"name": str, "status": str}]}]}, path)
    ratios = [row.get("round_ratio") for case in found["cases"] for row in case["rows"]]
    check(ratios, [(float, None)], path)
    return found
