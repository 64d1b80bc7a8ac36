"""``mingle check``: whether a merge would run."""

from __future__ import annotations

import argparse

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import say, say_method
from mingle.io.files import file_path
from mingle.runs import config
from mingle.runs.check import check


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "check", help="find out whether merge would run: the YAML file and every file it names"
    )
    parser.add_argument("config", type=file_path)
    arguments.offline(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    plan = check(config.load(args.config))
    say_method(plan.config.method)
    for name, lines in plan.left.items():
        for line in lines:
            say(f"{name}: {line}")
    if plan.forecast is not None:
        say(f"one tensor at a time: {plan.forecast}")
    say(f"{args.config}: all {len(plan.experts)} experts fit the base")
