"""The command line, ``mingle …`` or ``python -m mingle …``: one module per command.

Each command's module has `register`, which declares its arguments, and `run`, which carries it out.  Shared
parts are in `arguments` (options), `output` (tables and the console), `progress` (bars) and `crash` (errors
that nobody foresaw).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mingle.adaptation.divergence import AdaptationDiverged
from mingle.cli import (
    add,
    bench,
    check,
    completion,
    crash,
    demo,
    env,
    evaluate,
    explain,
    export,
    inspect,
    merge,
    output,
    play,
    report,
    reproduce,
)
from mingle.cli.arguments import Commands, LiteralParser
from mingle.merging.finite import NonFiniteMerge
from mingle.ops.dispatch import BackendUnavailable

_COMMANDS = (
    demo,
    reproduce,
    merge,
    check,
    add,
    evaluate,
    explain,
    inspect,
    export,
    play,
    report,
    bench,
    env,
    completion,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 for success; 1, after a message, where it ran and ended badly: a benchmark found a fault, an
        adaptation diverged, a result was not finite, Ctrl-C; 2, after a message, where the input or the
        machine was not fit for it.

    Raises:
        SystemExit: with 0 after ``--help``; with 2 after a message, for arguments that cannot be parsed; with
            1 where nobody reads on what is printed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would break ours
    sys.excepthook = crash.report
    output.set_up()
    args = argparse.Namespace(kept="nothing was changed")
    try:
        return _run(arguments, args)
    except BrokenPipeError:
        output.console.on_broken_pipe()
    except KeyboardInterrupt:
        output.console.print(output.line(f"interrupted: {args.kept}"), soft_wrap=True)
        return 1
    except (AdaptationDiverged, NonFiniteMerge) as error:
        output.fail(error)
        return 1
    except (ValueError, BackendUnavailable) as error:
        output.fail(error)
    except OSError as error:
        output.fail(output.explained(error))
    except MemoryError as error:
        output.fail(f"out of memory: {error}")
    return 2


def _run(arguments: Sequence[str] | None, args: argparse.Namespace) -> int:
    """Parse the arguments into `args`, and run the command that they name."""
    try:
        parser, _ = parsers()
        parser.parse_args(arguments, args)
        output.choose(json=getattr(args, "json", False), quiet=getattr(args, "quiet", False))
        if getattr(args, "offline", False):
            os.environ["HF_HUB_OFFLINE"] = "1"
        return args.run(args) or 0
    finally:
        output.flush()


def parsers() -> tuple[LiteralParser, Commands]:
    """The parser of the whole command line, and the commands, whose ``choices`` are their parsers by name."""
    parser = LiteralParser(prog="mingle", description="Merge fine-tuned models one after another.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        command.register(commands)
    return parser, commands
