"""The command line, ``mingle …`` or ``python -m mingle …``: one module per command.

Each command's module has `register`, which declares its arguments, and `run`, which carries it out.  Shared
parts are in `arguments` (options), `output` (tables and the console), `progress` (bars) and `crash` (errors
that nobody foresaw).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import torch

from mingle import ranks
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
    remove,
    report,
    reproduce,
    rollback,
    tidy,
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
    remove,
    evaluate,
    explain,
    inspect,
    rollback,
    tidy,
    export,
    play,
    report,
    bench,
    env,
    completion,
)

#: seconds that a process has to end after a failure: connections to a machine that is gone take long to close
_TO_END = 10

_ON_MEMORY = "`mingle check` says how much a merge takes"


def run_and_exit() -> NoReturn:
    """The program `mingle`: `main`, and the end of the process."""
    try:
        status = main()
    except Exception:
        if not ranks.launched():
            raise
        sys.excepthook(*sys.exc_info())
        status = 1
    if ranks.launched():
        # Threads in which PyTorch waits for other processes can abort this one when the interpreter ends.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 for success; 1, after a message, where it ran and ended badly: a benchmark found a fault, an
        adaptation diverged, a result was not finite, another process failed, Ctrl-C; 2, after a message,
        where the input or the machine was not fit for it.

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
    except ranks.OtherRankFailed as error:
        output.choose(silent=ranks.launched() and not (_is_first() or error.unspoken()))
        output.fail(error)
        return 1
    except (AdaptationDiverged, NonFiniteMerge) as error:
        output.fail(error)
        return 1
    except (ValueError, BackendUnavailable) as error:
        output.fail(error)
    except OSError as error:
        output.fail(output.explained(error))
    except MemoryError as error:
        output.fail(f"out of memory: {error}; {_ON_MEMORY}")
    except RuntimeError as error:
        if not _is_memory(error):
            raise
        output.fail(f"out of memory: {str(error).splitlines()[0]}; {_ON_MEMORY}")
    return 2


def _is_memory(error: RuntimeError) -> bool:
    """Whether PyTorch got no memory; on a CPU that has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _run(arguments: Sequence[str] | None, args: argparse.Namespace) -> int:
    """Parse the arguments into `args`, and run the command that they name."""
    try:
        parser, _ = parsers()
        parser.parse_args(arguments, args)
        output.choose(json=getattr(args, "json", False), quiet=getattr(args, "quiet", False))
        if getattr(args, "offline", False):
            os.environ["HF_HUB_OFFLINE"] = "1"
        return (_run_shared if ranks.launched() else args.run)(args) or 0
    finally:
        output.flush()


def _run_shared(args: argparse.Namespace) -> int | None:
    """Run a command in all processes that torchrun has started, or in one where it makes no use of them."""
    if not getattr(args, "shared", False):
        if not _is_first():
            return 0
        if int(os.environ["WORLD_SIZE"]) > 1:
            output.say(f"`mingle {args.command}` makes no use of several processes: one does all of it")
        return args.run(args)
    if not _is_first():
        output.choose(silent=True)
    try:
        with ranks.joined():
            with ranks.together("starting"):
                _refuse_differing(args)
            return args.run(args)
    except BaseException:
        signal.alarm(_TO_END)
        raise


def _refuse_differing(args: argparse.Namespace) -> None:
    """Raise `ValueError` unless all processes were started with the same arguments."""
    given = {name: str(value) for name, value in vars(args).items() if not callable(value)}
    everyone = ranks.gather(given)
    for number, found in enumerate(everyone):
        for name, value in found.items():
            if value != (first := everyone[0].get(name)):
                raise ValueError(f"rank {number} was started with {name} {value}, and rank 0 with {first}")


def _is_first() -> bool:
    """Whether this process speaks for all that torchrun has started."""
    return int(os.environ["RANK"]) == 0


def parsers() -> tuple[LiteralParser, Commands]:
    """The parser of the whole command line, and the commands, whose ``choices`` are their parsers by name."""
    parser = LiteralParser(prog="mingle", description="Merge fine-tuned models one after another.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for command in _COMMANDS:
        command.register(commands)
    return parser, commands
