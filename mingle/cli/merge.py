"""``mingle merge``: merge the models of a YAML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import console, result_table
from mingle.cli.progress import bars
from mingle.runs import config
from mingle.runs.check import check


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "merge", help="merge the models of a YAML file; resumes an interrupted merge"
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the merged model")
    arguments.offline(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    plan = check(config.load(args.config), args.out)
    with bars(len(plan.orders)) as observer:
        for result in plan.run(observer):
            console.print(result_table(result))
    console.print(f"merged model: [bold]{args.out}[/]")
