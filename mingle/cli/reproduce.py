"""``mingle reproduce``: the tables of the paper, measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mingle import ranks
from mingle.cli import arguments, pages
from mingle.cli.arguments import Commands
from mingle.cli.output import document, say, show
from mingle.cli.progress import bars
from mingle.io.files import file_path, made
from mingle.io.shared_folder import check_shared
from mingle.runs import report, reproduce
from mingle.runs.report import page
from mingle.runs.reproduce import summary
from mingle.runs.reproduce.tables import TABLES
from mingle.suites.protocol import PROTOCOLS


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "reproduce", help="measure a table of the paper; resumes interrupted work and shares it"
    )
    parser.add_argument("table", help=", ".join(TABLES))
    text = "suites, or `published` for those of the paper"
    parser.add_argument("--suite", type=arguments.names, default=("glyphs8",), metavar="A,B", help=text)
    parser.add_argument("--protocol", default="strict", choices=(*PROTOCOLS, "both"))
    text = "methods instead of the table's own"
    parser.add_argument("--methods", type=arguments.names, default=(), metavar="A,B", help=text)
    arguments.orders(parser)
    text = "seed samples per class"
    parser.add_argument("--samples-per-class", type=arguments.positive, default=5, help=text)
    parser.add_argument("--seed", type=int, default=0)
    arguments.method_options(parser)
    text = "measure what ACC and BWT need (ends), or the whole matrix (every)"
    parser.add_argument("--evaluate", default="ends", choices=reproduce.EVALUATE, help=text)
    parser.add_argument("--out", type=file_path, help="by default runs/reproduce-<table>")
    parser.add_argument("--keep-models", action="store_true", help="keep every merged model")
    text = "CPU threads; for small models several processes of one thread each are fastest"
    parser.add_argument("--threads", type=arguments.positive, help=text)
    arguments.offline(parser)
    arguments.printing(parser)
    pages.option(parser)
    parser.set_defaults(
        run=run, shared=True, kept="what is finished is kept; the same command goes on from there"
    )


def run(args: argparse.Namespace) -> None:
    request = reproduce.Request(
        args.table,
        suites=args.suite,
        protocols=tuple(PROTOCOLS) if args.protocol == "both" else (args.protocol,),
        orders=args.orders,
        methods=args.methods,
        options=arguments.parsed_options(args),
        samples_per_class=args.samples_per_class,
        seed=args.seed,
        evaluate=args.evaluate,
    )
    plan, out = reproduce.plan(request), args.out or Path("runs") / f"reproduce-{args.table}"
    if args.threads:
        torch.set_num_threads(args.threads)
    with ranks.together("making the folder"):
        if ranks.rank() == 0:
            made(out / "cells")
        check_shared(out)
    unfinished = sum(cell.result(out / "cells") is None for cell in plan.cells)
    try:
        with bars(unfinished) as observer, ranks.apart():
            reproduce.run(plan, out, observer, keep_models=args.keep_models)
        ranks.gather(None)
    finally:  # whatever ended the run, its finished cells are worth a table
        if ranks.rank() == 0:
            found = summary.write(plan, out)
            show(*report.comparison.tables(found))
            document({"folder": str(out), **found})
            say("table and plots: ", out)
            pages.told(out / page.REPORT, show=args.open)
