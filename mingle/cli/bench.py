"""``mingle bench``: the kernels next to other ways to compute the same."""

from __future__ import annotations

import argparse

from mingle.cli.arguments import Commands


def register(commands: Commands) -> None:
    # No character starts an option here, so that every argument reaches the benchmark's own parser.
    parser = commands.add_parser(
        "bench", help="time the kernels against other ways to compute them", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mingle.bench.run import main  # with matplotlib and more, which no other command needs

    status: int = main(args.arguments)
    return status
