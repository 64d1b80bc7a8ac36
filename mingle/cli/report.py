"""``mingle report``: the table and plots of a run, made again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mingle.cli.arguments import Commands
from mingle.cli.output import console
from mingle.runs import report


def register(commands: Commands) -> None:
    parser = commands.add_parser("report", help="make the table and plots of a run folder again")
    parser.add_argument("folder", type=Path, help="the folder that demo wrote")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results = json.loads((args.folder / "results.json").read_text())
    traces = json.loads((args.folder / "traces.json").read_text())
    report.write_csv(results, args.folder / "accuracy_matrix.csv")
    report.write_plots(results, traces, args.folder)
    console.print(report.table(results))
