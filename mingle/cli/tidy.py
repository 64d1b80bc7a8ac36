"""``mingle tidy``: forget old generations of a merged model's folder."""

from __future__ import annotations

import argparse

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import document, line, show
from mingle.io.files import file_path
from mingle.runs import life


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "tidy", help="forget old generations of a merged model, and free their files"
    )
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    text = (
        "how many generations to keep, the newest ones and the one in use among them; by default that alone"
    )
    parser.add_argument("--keep", type=arguments.positive, default=1, metavar="N", help=text)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be freed")
    arguments.printing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    freed = life.tidy(args.folder, args.keep, only_tell=args.dry_run)
    show(line(f"{args.folder}: {freed:,} bytes {'would be' if args.dry_run else 'were'} freed"))
    document({"folder": str(args.folder), "bytes": freed, "dry_run": args.dry_run})
