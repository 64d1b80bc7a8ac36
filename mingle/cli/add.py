"""``mingle add``: one more model into a merged one."""

from __future__ import annotations

import argparse
from typing import get_args

from mingle.cli import arguments, pages
from mingle.cli.arguments import Commands
from mingle.cli.output import document, result_document, result_table, show
from mingle.cli.progress import bars
from mingle.io.files import file_path
from mingle.merging.vocabulary import Vocabulary
from mingle.runs import merge
from mingle.runs.config import Expert


def register(commands: Commands) -> None:
    parser = commands.add_parser("add", help="merge one more model into a merged one")
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    parser.add_argument("--name", required=True, help="the task's name")
    parser.add_argument("--model", required=True, help="the fine-tuned model: a local folder or a hub id")
    parser.add_argument("--revision", help="a commit, branch or tag of the hub model")
    parser.add_argument(
        "--vocabulary",
        choices=get_args(Vocabulary),
        help="base: of a model with new tokens, merge the rows that the base has too; kept for later models",
    )
    text = "an option of the adaptation that changes from now on, such as steps=50; given once per option"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=text)
    arguments.samples(parser)
    arguments.shard(parser)
    arguments.offline(parser)
    arguments.printing(parser)
    pages.option(parser)
    parser.set_defaults(run=run, shared=True)


def run(args: argparse.Namespace) -> None:
    expert = Expert(args.name, args.model, args.revision)
    overrides = arguments.overrides(args)
    with bars(1) as observer:
        adapt = dict(arguments.parsed_options(args))
        result = merge.add(args.folder, expert, overrides, observer, args.vocabulary, adapt, args.shard)
    show(result_table(result))
    document({"folder": str(args.folder), **result_document(result)})
    pages.write(args.folder, show=args.open)
