"""``mingle check``: whether a merge would run."""

from __future__ import annotations

import argparse

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import document, line, say_method, show
from mingle.io.files import file_path
from mingle.runs import config
from mingle.runs.check import check


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "check", help="find out whether merge would run: the YAML file and every file it names"
    )
    parser.add_argument("config", type=file_path)
    arguments.offline(parser)
    arguments.printing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    plan = check(config.load(args.config))
    say_method(plan.config.method)
    show(
        *(line(f"{name}: {text}") for name, lines in plan.left.items() for text in lines),
        line(f"{args.config}: all {len(plan.experts)} experts fit the base"),
    )
    experts = {name: str(folder) for name, folder in plan.experts.items()}
    document(
        {"config": str(args.config), "method": plan.config.method, "experts": experts, "left": plan.left}
    )
