"""``mingle rollback``: an earlier generation of a merged model's folder."""

from __future__ import annotations

import argparse

from mingle.cli import arguments, pages
from mingle.cli.arguments import Commands
from mingle.cli.output import document, line, show
from mingle.io.files import file_path
from mingle.runs import life
from mingle.runs.report import page


def register(commands: Commands) -> None:
    parser = commands.add_parser("rollback", help="return to an earlier generation of a merged model")
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    text = "the generation's number, as inspect lists it"
    parser.add_argument("--to", type=arguments.positive, required=True, help=text)
    arguments.printing(parser)
    pages.option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    names = life.return_to(args.folder, args.to)
    show(line(f"{args.folder}: generation {args.to}: ", ", ".join(names) or "no tasks"))
    document({"folder": str(args.folder), "generation": args.to, "tasks": names})
    pages.told(page.write(args.folder), show=args.open)
