"""``mingle bench``: the kernels beside other ways to compute the same results."""

from __future__ import annotations

import argparse

from mingle.cli import output
from mingle.cli.arguments import Commands


def register(commands: Commands) -> None:
    # No character starts an option here, so that every argument reaches the benchmark's own parser.
    parser = commands.add_parser(
        "bench", help="time the kernels against other implementations", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mingle.bench.run import main  # imports matplotlib and more, which no other command needs

    output.choose(json=True)  # the benchmark prints its results itself; its log goes to stderr
    status: int = main(args.arguments)
    return status
