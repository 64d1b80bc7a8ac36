"""``mingle explain``: what each step of merging cost every task."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table

from mingle.cli import arguments, pages
from mingle.cli.arguments import Commands
from mingle.cli.output import document, line, points, say, show
from mingle.cli.progress import stages
from mingle.io.files import CheckpointError, file_path, writable, write_json
from mingle.merging.explain import STEPS, Explanation
from mingle.options import OptionError
from mingle.runs import explained, merge
from mingle.runs.report import page
from mingle.text import visible


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "explain", help="take the accuracy that merging cost apart: which step cost which task how much"
    )
    parser.add_argument("folder", type=file_path, help="the folder that merge wrote")
    parser.add_argument(
        "--expert",
        action="append",
        default=[],
        metavar="TASK=MODEL",
        help="a task's fine-tuned model, where the suite does not bring it: a local folder or a hub id",
    )
    parser.add_argument("--batch-size", type=arguments.positive, default=128)
    parser.add_argument("--out", type=file_path, metavar="FILE", help="a JSON file for the numbers")
    arguments.samples(parser)
    arguments.offline(parser)
    arguments.printing(parser)
    pages.option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    given = dict(_expert(text) for text in args.expert)
    if args.out is not None:
        writable(args.out.parent)
    with stages("reading") as stage:
        found = merge.explain(
            args.folder,
            arguments.overrides(args),
            given,
            args.batch_size,
            lambda name: stage(f"measuring {name}"),
        )
    explanations = explained.described(found)
    if args.out is not None:
        write_json(args.out, explanations)
    steps = dict.fromkeys(step for each in found for step in each.changes)
    show(_table(found), *(line(f"{step}: {STEPS[step]}") for step in steps))
    document({"folder": str(args.folder), **explanations})
    try:
        explained.keep(args.folder, found, args.suite)
        pages.told(page.write(args.folder), show=args.open)
    except CheckpointError as error:
        say(f"not kept beside the merged model: {error}")


def _expert(text: str) -> tuple[str, str]:
    name, separator, model = text.partition("=")
    if not (name and separator and model):
        raise OptionError(f"--expert {text}: expected TASK=MODEL")
    return name, model


def _table(found: Sequence[Explanation]) -> Table:
    """A row for each task, and one for their means; columns are steps."""
    steps = list(dict.fromkeys(step for each in found for step in each.changes))
    starts = " or ".join(dict.fromkeys(each.start for each in found))
    title = "accuracy in per cent, and what each step changes in points"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold", min_width=12)
    for column in (starts, *steps, "merged"):
        broken = column.replace(" ", "\n").replace("-", "-\n")  # into short lines
        table.add_column(broken, justify="right", no_wrap=True)
    for each in found:
        changes = [points(each.changes[step]) if step in each.changes else "" for step in steps]
        table.add_row(visible(each.task), f"{each.before:.1f}", *changes, f"{each.merged:.1f}")
    if len(found) > 1:
        means = [statistics.fmean(each.changes.get(step, 0.0) for each in found) for step in steps]
        before = statistics.fmean(each.before for each in found)
        merged = statistics.fmean(each.merged for each in found)
        table.add_section()
        table.add_row("mean", f"{before:.1f}", *map(points, means), f"{merged:.1f}")
    return table
