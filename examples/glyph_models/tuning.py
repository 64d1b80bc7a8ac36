"""How the glyph suites' settings of the methods that train were chosen, on tasks that are in no suite.

Learning rates depend on the size of a model, and the published ones are for much larger models; so does how
much of a layer's width the ranks take.  For every method that learns, all combinations of `GRIDS` are
measured.  The best mean ACC decides among the settings whose mean BWT is above `FORGETTING`, or among all
where none is; of those within half a point of it the one that forgets least is chosen. Forgetting grows with
the number of tasks and the suites have more of them than the tuning tasks: the bound is half of what is
wanted there. Started twice, two processes share the work.

    python examples/glyph_models/tuning.py bench/results/cpu/glyphs-tuning.json --work runs/tuning
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mingle.io.files import write_json
from mingle.io.provenance import versions
from mingle.runs import reproduce
from mingle.suites.protocol import PROTOCOLS

SUITE = "glyphs-tuning"
FORGETTING, WITHIN = -2.0, 0.5
#: method → option → values
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "mingle": {"rank": (8, 16, 32), "gamma": (0.0, 0.1, 0.3, 1.0), "lr": (1e-3, 2e-3, 4e-3)},
    "adamerging": {"lr": (1e-4, 1e-3, 1e-2)},
    "wemoe": {"lr": (1e-4, 1e-3, 1e-2)},
    "nufilt": {"r_p": (32, 64, 128), "lr": (1e-3, 1e-2)},
}
_Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/tuning"),
        help="folder of finished runs, which are not repeated",
    )
    parser.add_argument("--protocol", default="strict", choices=PROTOCOLS)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads of this process")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)  # better now than after an hour
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = {
        method: [measure(method, options, args) for options in settings(grid)]
        for method, grid in GRIDS.items()
    }
    found = {method: {"chosen": choose(measured), "rows": measured} for method, measured in rows.items()}
    for method, result in found.items():
        print(f"{method}: {result['chosen']}")
    facts = {
        "suite": SUITE,
        "protocol": args.protocol,
        "bwt above": FORGETTING,
        "acc within": WITHIN,
        "versions": versions(),
    }
    write_json(args.out, facts | {"methods": found})


def settings(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid, the first option varying slowest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def measure(method: str, options: Mapping[str, Any], args: argparse.Namespace) -> _Row:
    """ACC and BWT of every order; both empty where the adaptation diverged in one."""
    request = reproduce.Request(
        "main", (SUITE,), (args.protocol,), args.orders, (method,), tuple(options.items())
    )
    plan = reproduce.plan(request)
    reproduce.run(plan, args.work)
    results = [cell.result(args.work / "cells") for cell in plan.cells]
    finished = [result for result in results if result is not None and result["failed"] is None]
    whole = len(finished) == args.orders
    row = {
        "options": dict(options),
        **{name: [result[name] for result in finished] if whole else [] for name in ("acc", "bwt")},
    }
    told = (
        f"ACC {statistics.fmean(row['acc']):5.1f}  BWT {statistics.fmean(row['bwt']):+5.1f}"
        if whole
        else "diverged"
    )
    print(f"{method:12}{options!s:60}{told}", flush=True)
    return row


def choose(rows: Sequence[_Row]) -> dict[str, Any]:
    """The options that the rule of this file picks."""
    means = [
        (row["options"], statistics.fmean(row["acc"]), statistics.fmean(row["bwt"]))
        for row in rows
        if row["acc"]
    ]
    kept = [row for row in means if row[2] > FORGETTING] or means
    best = max(acc for _, acc, _ in kept)
    chosen: dict[str, Any] = max((row for row in kept if row[1] >= best - WITHIN), key=lambda row: row[2])[0]
    return chosen


if __name__ == "__main__":
    main()
