"""The figures that the paper shows in the place of a cell."""

from __future__ import annotations

import statistics

from mingle.runs.reproduce import paper
from mingle.runs.reproduce.paper import Scores
from mingle.runs.reproduce.tables import Row


def expected(table: str, row: Row, suite: str) -> Scores | None:
    """ACC and BWT as published, None where neither was.

    Options that the user changed are not considered.
    """
    if table == "ablation":
        return paper.ABLATION.get(row.series or "", {}).get(suite) if row.method == "mingle" else None
    if row.options or row.samples_per_class:  # a point of a sweep
        return None
    if row.method == "mingle" and suite in paper.CORRUPTIONS:
        return paper.CORRUPTIONS[suite], None
    if row.method == "pre-trained":
        return _pre_trained(suite)
    return paper.METHODS.get((row.method, suite))


def _pre_trained(suite: str) -> Scores | None:
    """The mean over the tasks of a suite ``clip-<size>-<count>``; an unchanged model forgets nothing."""
    base, _, count = suite.rpartition("-")
    figures = [by_base[base][0] for by_base in paper.PER_TASK.values() if base in by_base]
    if not count.isdecimal() or not figures:
        return None
    return round(statistics.fmean(figures[: int(count)]), 1), 0.0
