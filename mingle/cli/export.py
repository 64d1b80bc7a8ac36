"""``mingle export``: a merged model as a plain Hugging Face folder."""

from __future__ import annotations

import argparse

from mingle.cli.arguments import Commands
from mingle.cli.output import say
from mingle.io.export import check_target
from mingle.io.files import file_path
from mingle.merging.merger import Merger


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "export", help="write a merged model as a plain Hugging Face folder, which transformers loads"
    )
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    parser.add_argument("--out", type=file_path, required=True, help="a new folder")
    parser.add_argument(
        "--task", help="the task whose model to write, for classifiers and for the method individual"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_target(args.out)
    Merger.from_pretrained(args.folder).export(args.out, args.task)
    say("plain model: ", args.out)
