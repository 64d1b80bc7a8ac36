"""``mingle report``: the page of a run, and its table and plots, made again."""

from __future__ import annotations

import argparse

from mingle.cli import arguments, pages
from mingle.cli.arguments import Commands
from mingle.cli.output import document, show
from mingle.io.files import file_path, writable
from mingle.runs import report
from mingle.runs.report import page


def register(commands: Commands) -> None:
    parser = commands.add_parser("report", help="make the page, the table and the plots of a run again")
    parser.add_argument("folder", type=file_path, help="the folder that demo, reproduce, merge or add wrote")
    arguments.printing(parser)
    pages.option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    made = page.of(args.folder)
    writable(args.folder)
    found = {"folder": str(args.folder), "command": made.command}
    if made.command == "demo":
        results, traces = report.read(args.folder)
        report.write_csv(results, args.folder / "accuracy_matrix.csv")
        report.write_plots(results, traces, args.folder)
        show(report.table(results))
        found |= results
    document(found)
    pages.told(page.write(args.folder), show=args.open)
