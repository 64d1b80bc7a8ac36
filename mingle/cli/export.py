"""``mingle export``: a merged model as a plain Hugging Face folder, or as LoRA adapters."""

from __future__ import annotations

import argparse

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import document, say
from mingle.io.files import file_path
from mingle.io.staging import check_target
from mingle.merging.exports import FORMATS
from mingle.runs import merge


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "export", help="write a merged model as a plain Hugging Face folder, or as LoRA adapters"
    )
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    parser.add_argument("--out", type=file_path, required=True, help="a new folder")
    text = "transformers: one plain model; peft: one LoRA adapter per task, and the router beside them"
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=text)
    text = "the task whose model to write, for methods with gates, for classifiers and for individual"
    parser.add_argument("--task", help=text)
    arguments.samples(parser)
    arguments.offline(parser)
    arguments.printing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_target(args.out)
    merge.export(args.folder, args.out, arguments.overrides(args), args.task, args.format)
    document({"folder": str(args.out), "format": args.format, "task": args.task})
    say("adapters: " if args.format == "peft" else "plain model: ", args.out)
