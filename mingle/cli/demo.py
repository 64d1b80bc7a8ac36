"""``mingle demo``: methods compared on an embedded suite."""

from __future__ import annotations

import argparse
from pathlib import Path

from mingle.cli import arguments, pages
from mingle.cli.arguments import Commands
from mingle.cli.output import document, say, show
from mingle.cli.progress import bars
from mingle.io.files import file_path
from mingle.methods import METHODS
from mingle.runs import compare, report
from mingle.runs.report import page
from mingle.suites.protocol import PROTOCOLS


def register(commands: Commands) -> None:
    defaults = compare.Comparison()
    parser = commands.add_parser(
        "demo", help="compare methods on an embedded suite, without downloads, in a few minutes"
    )
    known = "glyphs4, glyphs8, glyphs20, glyphs8-shared, glyphs4-corrupted, texts8, …"
    parser.add_argument("--suite", default=defaults.suite, help=known)
    parser.add_argument("--protocol", default=defaults.protocol, choices=PROTOCOLS)
    chosen = ",".join(defaults.methods)
    parser.add_argument("--methods", default=chosen, help=f"comma-separated, of: {', '.join(METHODS)}")
    arguments.orders(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=file_path, default=Path("runs/demo"))
    arguments.method_options(parser)
    arguments.offline(parser)
    arguments.printing(parser)
    pages.option(parser)
    kept = "the results of finished methods are kept; the same command starts anew"
    parser.set_defaults(run=run, kept=kept)


def run(args: argparse.Namespace) -> None:
    names, options = arguments.names(args.methods), arguments.parsed_options(args)
    comparison = compare.Comparison(
        args.suite, args.protocol, names, args.orders, seed=args.seed, options=options
    )
    with bars(len(names) * args.orders) as observer:
        results = compare.run(comparison, args.out, observer)
    show(report.table(results))
    document({"folder": str(args.out), **results})
    say("results, plots and merged models: ", args.out)
    pages.told(args.out / page.REPORT, show=args.open)
