"""``mingle inspect``: the contents of a merged model's folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import document, line, percent, show
from mingle.io.files import file_path
from mingle.merging.opened import opened
from mingle.text import visible

#: short lines: a terminal of 80 columns has room for numbers, and for a beginning of names and notes
_NUMBERS = ("seed\nsamples", "when\nmerged", "accuracy\nnow", "task\nunknown", "bytes")


def register(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="show what a merged model's folder holds")
    parser.add_argument("folder", type=file_path)
    arguments.printing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    manifest = opened(args.folder).manifest
    tasks = [_task(manifest, i) for i in range(len(manifest["tasks"]))]
    base, options = manifest["base"]["sha256"][:16], json.dumps(manifest["options"])
    show(
        line(f"{args.folder}: {manifest['method']}, {len(tasks)} tasks"),
        _table(tasks),
        line(f"base SHA-256 {base}…, options {options}"),
    )
    kept = ("method", "task_type", "seed", "dtype", "options", "base", "metadata")
    document({"folder": str(args.folder), **{key: manifest[key] for key in kept}, "tasks": tasks})


def _task(manifest: dict[str, Any], place: int) -> dict[str, Any]:
    """What is known of a task, with accuracies in per cent."""
    task, matrix = manifest["tasks"][place], manifest["matrix"]
    return {
        "name": task["name"],
        "seed_samples": task["seed_samples"],
        "when_merged": matrix[place][place],
        "now": matrix[-1][place],
        "task_unknown": manifest["unknown"][-1][place] if "unknown" in manifest else None,
        "bytes": task["tensors"]["bytes"] if task["tensors"] else 0,
        "notes": [note for note in (task["skipped"], *task["notes"]) if note],
    }


def _table(tasks: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("task", overflow="fold")
    for column in _NUMBERS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("notes", overflow="fold")
    for task in tasks:
        measured = (percent(task[key]) for key in ("when_merged", "now", "task_unknown"))
        cells = (str(task["seed_samples"]), *measured, f"{task['bytes']:,}")
        table.add_row(visible(task["name"]), *cells, visible("; ".join(task["notes"])))
    return table
