"""``mingle merge``: merge the models of a YAML file."""

from __future__ import annotations

import argparse
from typing import Any

from mingle import ranks
from mingle.cli import arguments, pages
from mingle.cli.arguments import Commands
from mingle.cli.output import document, method_name, result_document, result_table, say, show
from mingle.cli.progress import bars
from mingle.io.files import file_path
from mingle.runs import group
from mingle.runs.check import plan_of


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "merge", help="merge the models of a YAML file; resumes an interrupted merge"
    )
    parser.add_argument("config", type=file_path)
    parser.add_argument("--out", type=file_path, required=True, help="folder for the merged model")
    arguments.offline(parser)
    arguments.printing(parser)
    pages.option(parser)
    parser.set_defaults(
        run=run, shared=True, kept="what was merged is saved; the same command goes on from there"
    )


def run(args: argparse.Namespace) -> None:
    with ranks.together("checking"):
        plan = plan_of(args.config, args.out)
        group.check_same(plan)
    say("method: ", method_name(plan.config.method))
    orders: list[dict[str, Any]] = []
    try:
        with bars(len(plan.orders)) as observer:
            for folder, result in zip(plan.folders, plan.run(observer), strict=True):
                show(result_table(result))
                orders.append({"folder": str(folder), **result_document(result)})
    except (ArithmeticError, RuntimeError, ValueError) as error:
        if plan.begun():
            error.add_note(args.kept)
        raise
    document({"folder": str(args.out), "method": plan.config.method, "orders": orders})
    say("merged model: ", args.out)
    pages.write(args.out, show=args.open)
