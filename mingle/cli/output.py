"""The console, and how commands print results.

What a command found is printed by `show`, and as data by `document`: which of the two it is, the user chooses
by ``--json``.  All else is a message, printed by `say`, which ``--quiet`` leaves out.

Whatever is printed as a string is shown as it is: there is no markup, and what cannot be seen is escaped.
Styles are given beside the text.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from mingle.io.files import json_text
from mingle.merging.evaluate import Result
from mingle.methods import DEFAULT
from mingle.text import visible


class _LiteralConsole(Console):
    """A console that escapes what cannot be seen in every string, be it printed or in a table.

    Lines break where the project's own messages break them; where a name must not, its column or bar says so
    by `visible`.
    """

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False, highlight=False)

    def aim(self, *, stderr: bool) -> None:
        """Print to stderr or stdout from now on, with colours and bars where that is a terminal."""
        self.stderr = stderr
        self.is_interactive = self.file.isatty() and not self.is_dumb_terminal
        self._color_system = self._detect_color_system()

    def render_str(self, text: str, **style: Any) -> Text:
        return super().render_str(visible(text, keep="\n"), **style)


@dataclass
class _Wanted:
    """What the user chose: one JSON document instead of tables; no messages but errors."""

    json: bool = False
    quiet: bool = False


console, _wanted = _LiteralConsole(), _Wanted()
_log = RichHandler(console=console, show_path=False, highlighter=None, markup=False)


def set_up() -> None:
    """Send the log to the console, and let no character fail for want of an encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    choose()
    _log.setFormatter(_LiteralFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[_log])
    # transformers sets its level by this when it is imported; if it is already, only the level itself counts.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)


class _LiteralFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n")


def choose(*, json: bool = False, quiet: bool = False, silent: bool = False) -> None:
    """What is printed from now on, and where.

    Args:
        json: nothing but the document goes to stdout; the console is on stderr.
        quiet: neither messages nor progress nor warnings.
        silent: nothing at all; another process speaks for this one.
    """
    _wanted.json, _wanted.quiet = json, quiet or silent
    console.quiet = silent
    console.aim(stderr=json)
    _log.setLevel(logging.ERROR if quiet else logging.NOTSET)


def is_quiet() -> bool:
    """Whether nobody wants to know how a command is getting on."""
    return _wanted.quiet


def has_bars() -> bool:
    """Whether bars can be drawn; a variable such as FORCE_COLOR makes no terminal of a file."""
    return console.is_interactive and not _wanted.quiet


def say(text: str, value: object = "", style: str = "bold") -> None:
    """A message: a `line` for whom it may concern."""
    if not _wanted.quiet:
        console.print(line(text, value, style), soft_wrap=True)


def show(*parts: Table | Text) -> None:
    """What a command found, for a person: tables, and lines of any length."""
    for part in parts:
        if not _wanted.json:
            console.print(part, soft_wrap=isinstance(part, Text))


def document(value: Any) -> None:
    """What a command found, for a program: plain data, once per command."""
    if _wanted.json:
        sys.stdout.write(json_text(value))


def line(text: str, value: object = "", style: str = "bold") -> Text:
    """`text`, and then the value in that style."""
    return Text.assemble(visible(text), (visible(str(value)), style))


def fail(error: object) -> None:
    """The reason why a command ends badly; on stderr where stdout takes nothing any more."""
    notes = getattr(error, "__notes__", ())
    reason = visible("\n".join([str(error), *notes]), keep="\n")
    try:
        console.print(Text.assemble(("error: ", "bold red"), reason), soft_wrap=True)
        flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not console.stderr:  # else it stands there already
            print(f"error: {reason}", file=sys.stderr)


def flush() -> None:
    """Let an error in writing what was printed happen now rather than while Python exits."""
    if sys.stdout is not None:
        sys.stdout.flush()


def explained(error: OSError) -> str:
    """The path and the reason of an operating system's error, which has them in another order and form."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def method_name(name: str) -> str:
    """Which method merges."""
    return f"{name}, the default" if name == DEFAULT else name


def result_table(result: Result) -> Table:
    """Every task's accuracy, when it was merged and now, and where the task has to be found too."""
    unknown = result.unknown[-1] if result.unknown else []
    measured = any(value is not None for value in unknown)
    found = f" (task unknown {percent(result.acc_unknown)})" if measured else ""
    title = f"ACC {percent(result.acc)}{found}, BWT {points(result.bwt)}"
    table = Table(title=title, title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("when merged", justify="right")
    table.add_column("now", justify="right")
    if measured:
        table.add_column("now, task unknown", justify="right")
    for j, name in enumerate(result.tasks):
        last = [percent(unknown[j])] if measured else []
        table.add_row(visible(name), percent(result.matrix[j][j]), percent(result.matrix[-1][j]), *last)
    return table


def result_document(result: Result) -> dict[str, Any]:
    """All that was measured, and the means over tasks; what was not measured is None."""
    return asdict(result) | {"acc": result.acc, "acc_unknown": result.acc_unknown, "bwt": result.bwt}


def percent(value: float | None) -> str:
    """With one decimal; a dash for a value that was not measured."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f} %"


def points(value: float) -> str:
    """With one decimal and a sign; a dash for a value that was not measured."""
    return "–" if math.isnan(value) else f"{value:+.1f}"
