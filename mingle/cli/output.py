"""The console, and how commands print results.

Whatever is printed as a string is shown as it is: there is no markup, and what cannot be seen is escaped.
Styles are given beside the text.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

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

    def render_str(self, text: str, **style: Any) -> Text:
        return super().render_str(visible(text, keep="\n"), **style)


console = _LiteralConsole()


def set_up() -> None:
    """Send the log to the console, and let no character fail for want of an encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = RichHandler(console=console, show_path=False, highlighter=None, markup=False)
    handler.setFormatter(_LiteralFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # transformers sets its level by this when it is imported; if it is already, only the level itself counts.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)


class _LiteralFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n")


def say(text: str, value: object = "", style: str = "bold") -> None:
    """One line, whatever the terminal's width: `text`, and then the value in that style."""
    console.print(Text.assemble(visible(text), (visible(str(value)), style)), soft_wrap=True)


def fail(error: object) -> None:
    """The reason why a command ends badly; on stderr where stdout takes nothing any more."""
    notes = getattr(error, "__notes__", ())
    reason = visible("\n".join([str(error), *notes]), keep="\n")
    try:
        console.print(Text.assemble(("error: ", "bold red"), reason), soft_wrap=True)
        flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def say_method(name: str) -> None:
    """Which method merges."""
    say("method: ", f"{name}, the default" if name == DEFAULT else name)


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


def percent(value: float | None) -> str:
    """With one decimal; a dash for a value that was not measured."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f} %"


def points(value: float) -> str:
    """With one decimal and a sign; a dash for a value that was not measured."""
    return "–" if math.isnan(value) else f"{value:+.1f}"
