"""``mingle eval``: the accuracy of a merged model."""

from __future__ import annotations

import argparse

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import document, result_document, result_table, show
from mingle.io.files import file_path
from mingle.runs import merge


def register(commands: Commands) -> None:
    parser = commands.add_parser("eval", help="measure a merged model's accuracy on all its tasks")
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    parser.add_argument("--batch-size", type=arguments.positive, default=128)
    arguments.samples(parser)
    arguments.shard(parser)
    arguments.offline(parser)
    arguments.printing(parser)
    parser.set_defaults(run=run, shared=True)


def run(args: argparse.Namespace) -> None:
    result = merge.evaluate(args.folder, arguments.overrides(args), args.batch_size, args.shard)
    show(result_table(result))
    document({"folder": str(args.folder), **result_document(result)})
