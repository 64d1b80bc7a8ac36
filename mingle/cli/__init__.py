"""The command line, ``mingle …`` or ``python -m mingle …``: one module per command.

Each command's module has `register`, which declares its arguments, and `run`, which carries it out.  Shared
parts are in `arguments` (options), `output` (tables and the console) and `progress` (bars).
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence

from rich.logging import RichHandler

from mingle.adaptation.divergence import AdaptationDiverged
from mingle.cli import add, bench, check, demo, env, evaluate, export, inspect, merge, report, reproduce
from mingle.cli.output import console
from mingle.merging.merger import NonFiniteMerge

_COMMANDS = (demo, reproduce, merge, check, add, evaluate, inspect, export, report, bench, env)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 for success; 1 where a benchmark found a fault; 2, after a message, where the input was wrong.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would break ours
    handler = RichHandler(console=console, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("transformers").setLevel(logging.ERROR)
    args = _parser().parse_args(arguments)
    if getattr(args, "offline", False):
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return args.run(args) or 0
    except (ValueError, AdaptationDiverged, NonFiniteMerge, FileNotFoundError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mingle", description="Merge fine-tuned models one after another.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        command.register(commands)
    return parser
