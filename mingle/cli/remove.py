"""``mingle remove``: tasks leave a merged model."""

from __future__ import annotations

import argparse

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import console, result_table, say
from mingle.io.files import file_path
from mingle.runs import life


def register(commands: Commands) -> None:
    parser = commands.add_parser("remove", help="take tasks out of a merged model")
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    parser.add_argument("names", nargs="+", metavar="name", help="a task")
    arguments.samples(parser)
    arguments.offline(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    result, stays = life.remove(args.folder, args.names, arguments.overrides(args))
    for name, lines in stays.items():
        for line in lines:
            say(f"{name}: {line}")
        if not lines:
            say(f"{name}: nothing of it stays")
    console.print(result_table(result))
