"""``mingle inspect``: the contents of a merged model's folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.table import Table

from mingle.cli.arguments import Commands
from mingle.cli.output import console, percent, say
from mingle.io.files import file_path
from mingle.merging.opened import opened
from mingle.runs import life
from mingle.runs.life import Generation
from mingle.text import visible

#: short lines: a terminal of 80 columns has room for numbers, and for a beginning of names and notes
_NUMBERS = ("seed\nsamples", "when\nmerged", "accuracy\nnow", "task\nunknown", "bytes")


def register(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="show what a merged model's folder holds")
    parser.add_argument("folder", type=file_path)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    manifest = opened(args.folder).manifest
    say(f"{args.folder}: {manifest['method']}, {len(manifest['tasks'])} tasks")
    table = Table()
    table.add_column("task", overflow="fold")
    for column in _NUMBERS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("notes", overflow="fold")
    for i, task in enumerate(manifest["tasks"]):
        measured = [manifest["matrix"][row][i] for row in (i, -1)]
        measured.append(manifest["unknown"][-1][i] if "unknown" in manifest else None)
        size = task["tensors"]["bytes"] if task["tensors"] else 0
        notes = "; ".join([task["skipped"] or "", *task["notes"]]).strip("; ")
        cells = (str(task["seed_samples"]), *map(percent, measured), f"{size:,}")
        table.add_row(visible(task["name"]), *cells, visible(notes))
    console.print(table)
    base, options = manifest["base"]["sha256"][:16], json.dumps(manifest["options"])
    say(f"base SHA-256 {base}…, options {options}")
    for task in manifest.get("removed", []):
        for line in task["stays"]:
            say(f"{task['name']}, removed: {line}; concerns {', '.join(task['tasks'])}")
    if generations := life.history(args.folder):
        console.print(_generations(generations))


def _generations(generations: Sequence[Generation]) -> Table:
    table = Table(title="generations", title_justify="left")
    for column in ("", "from", "tasks", "ACC"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what changed", overflow="fold")
    table.add_column("bytes of\nits own", justify="right", no_wrap=True)
    for each in generations:
        number = f"in use: {each.number}" if each.current else str(each.number)
        changed = ", ".join([*(f"+ {name}" for name in each.came), *(f"− {name}" for name in each.left)])
        parent = "" if each.parent is None else str(each.parent)
        cells = (number, parent, str(each.tasks), percent(each.acc))
        table.add_row(*cells, visible(changed), f"{each.own_bytes:,}")
    return table
