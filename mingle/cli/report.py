"""``mingle report``: the table and plots of a run, made again."""

from __future__ import annotations

import argparse

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import document, show
from mingle.io.files import file_path, writable
from mingle.runs import report


def register(commands: Commands) -> None:
    parser = commands.add_parser("report", help="make the table and plots of a run folder again")
    parser.add_argument("folder", type=file_path, help="the folder that demo wrote")
    arguments.printing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results, traces = report.read(args.folder)
    writable(args.folder)
    report.write_csv(results, args.folder / "accuracy_matrix.csv")
    report.write_plots(results, traces, args.folder)
    show(report.table(results))
    document({"folder": str(args.folder), **results})
