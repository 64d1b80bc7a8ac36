"""``mingle completion``: a script by which a shell completes commands, options, names and folders."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mingle import cli, suites
from mingle.cli.arguments import Commands
from mingle.methods import METHODS
from mingle.options import OptionError
from mingle.runs.reproduce.tables import TABLES

_SHELLS = ("bash", "zsh", "fish")
#: what options and arguments take, by their names in all commands
_WORDS = {"methods": tuple(METHODS), "suite": suites.names(), "table": tuple(TABLES)}
_FOLDERS, _FILES = ("folder", "out", "model", "plots"), ("compare",)


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "completion", help="print a script by which a shell completes what is typed after mingle"
    )
    parser.add_argument("shell", choices=_SHELLS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        raise OptionError("completion needs the package shtab: pip install shtab") from None
    from mingle.bench.run import make_parser  # imports more than other commands need

    parser, commands = cli.parsers()
    commands.choices["bench"] = make_parser()
    for command in commands.choices.values():
        for action in command._actions:
            kind: Any = _kind(action, shtab)
            if kind is not None:
                action.complete = kind
            elif action.dest in _WORDS:
                action.choices = _WORDS[action.dest]
    sys.stdout.write(shtab.complete(parser, args.shell))


def _kind(action: argparse.Action, shtab: Any) -> Any:
    """How shtab is told that an argument takes files or folders; None where it does not."""
    if action.dest == "config":
        return shtab.glob("*.yaml", "*.yml")
    if action.dest in _FILES or str(action.metavar).startswith("FILE"):
        return shtab.FILE
    return shtab.DIRECTORY if action.dest in _FOLDERS else None
