"""One rule by which the settings of all methods are chosen, on tasks that are in no suite.

For every method, all combinations of a grid are measured.  The best mean ACC decides among the settings whose
mean BWT is above `FORGETTING`, or among all where none is; of those within `WITHIN` points of it the one that
forgets least is chosen.  Forgetting grows with the number of tasks and the suites have more of them than the
tuning suites: the bound is half of what is wanted there.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mingle.io.files import write_json
from mingle.io.provenance import versions
from mingle.runs import reproduce

logger = logging.getLogger(__name__)

FORGETTING, WITHIN = -2.0, 0.5

#: option → values
Grid = Mapping[str, Sequence[Any]]
#: method → grid, of the methods that train nothing; they are the same for models of all kinds
WITHOUT_TRAINING: Mapping[str, Grid] = {
    "task-arithmetic": {"scaling": (0.1, 0.2, 0.3, 0.5)},
    "ties": {"scaling": (0.1, 0.3, 0.5, 1.0)},
    "magmax": {"scaling": (0.3, 0.5, 1.0)},
    "consensus-ta": {"scaling": (0.1, 0.3, 0.5)},
    "opcm": {"alpha": (0.3, 0.5, 0.7)},
    "tsv-m": {"scaling": (0.5, 0.7, 1.0, 1.3)},
    "iso-c": {"scaling": (0.5, 0.7, 1.0, 1.3)},
    "wudi": {"scaling": (0.5, 0.7, 1.0)},
    "made-it": {"share": (0.1, 0.2, 0.4)},
    "mass": {"depth": (0, 1, 2), "most": (1, 2)},
}


@dataclass(frozen=True)
class Tuning:
    """What is measured.

    Attributes:
        suite: of the tuning tasks.
        work: folder of finished runs, which are not repeated: two processes on one folder share the work.
        protocol: ``strict`` or ``official``.
        orders: how many task orders, by the seeds 42, 43, …
    """

    suite: str
    work: Path
    protocol: str = "strict"
    orders: int = 3

    def run(self, grids: Mapping[str, Grid]) -> dict[str, Any]:
        """Plain data: what was measured of each method, and the options chosen."""
        methods = {}
        for method, grid in grids.items():
            rows = [self.measure(method, options) for options in combinations(grid)]
            methods[method] = {"chosen": choose(rows), "rows": rows}
            logger.info("%s: %s", method, methods[method]["chosen"])
        return {
            "suite": self.suite,
            "protocol": self.protocol,
            "bwt above": FORGETTING,
            "acc within": WITHIN,
            "versions": versions(),
            "methods": methods,
        }

    def measure(self, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, and ACC and BWT of every order; both empty where the adaptation diverged in one."""
        request = reproduce.Request(
            "main", (self.suite,), (self.protocol,), self.orders, (method,), tuple(options.items())
        )
        plan = reproduce.plan(request)
        reproduce.run(plan, self.work)
        results = [cell.result(self.work / "cells") for cell in plan.cells]
        finished = [result for result in results if result is not None and result["failed"] is None]
        whole = len(finished) == self.orders
        row = {name: [result[name] for result in finished] if whole else [] for name in ("acc", "bwt")}
        told = (
            "ACC {:5.1f}  BWT {:+5.1f}".format(*map(statistics.fmean, row.values())) if whole else "diverged"
        )
        logger.info("%-12s%-60s%s", method, dict(options), told)
        return {"options": dict(options), **row}


def combinations(grid: Grid) -> list[dict[str, Any]]:
    """All combinations of a grid, the first option varying slowest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def choose(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options that the rule of this module picks; rows are as `Tuning.measure` returns them."""
    means = [
        (row["options"], statistics.fmean(row["acc"]), statistics.fmean(row["bwt"]))
        for row in rows
        if row["acc"]
    ]
    kept = [row for row in means if row[2] > FORGETTING] or means
    best = max(acc for _, acc, _ in kept)
    chosen: dict[str, Any] = max((row for row in kept if row[1] >= best - WITHIN), key=lambda row: row[2])[0]
    return chosen


def as_script(about: str, suite: str, work: Path, grids: Mapping[str, Grid]) -> None:
    """Measure grids on a suite of tuning tasks, as a script whose arguments say where results go.

    Args:
        about: what the script is for.
        suite, work: see `Tuning`; another folder may be given.
        grids: method → grid.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=work, help="folder of finished runs")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)  # better now than after an hour
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    write_json(args.out, Tuning(suite, args.work).run(grids))
