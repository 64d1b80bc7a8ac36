"""``mingle remove``: tasks leave a merged model."""

from __future__ import annotations

import argparse

from mingle.cli import arguments, pages
from mingle.cli.arguments import Commands
from mingle.cli.output import document, line, result_document, result_table, show
from mingle.io.files import file_path
from mingle.runs import life
from mingle.runs.report import page


def register(commands: Commands) -> None:
    parser = commands.add_parser("remove", help="take tasks out of a merged model")
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    parser.add_argument("names", nargs="+", metavar="name", help="a task")
    arguments.samples(parser)
    arguments.offline(parser)
    arguments.printing(parser)
    pages.option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    result, stays = life.remove(args.folder, args.names, arguments.overrides(args))
    for name, texts in stays.items():
        show(*(line(f"{name}: {text}") for text in texts or ["nothing of it stays"]))
    show(result_table(result))
    document({"folder": str(args.folder), "stays": stays, **result_document(result)})
    pages.told(page.write(args.folder), show=args.open)
