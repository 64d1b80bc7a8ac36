"""``report.html`` on the command line: where it is, and ``--open``."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from mingle.cli.output import say


def option(parser: argparse.ArgumentParser) -> None:
    """``--open``."""
    parser.add_argument(
        "--open", action="store_true", help="open report.html in the browser when it is written"
    )


def told(path: Path, *, show: bool) -> None:
    """Say where the page is, as the last line, once it was opened where that is wanted."""
    if show and not webbrowser.open(path.resolve().as_uri()):
        say("no browser could be opened")
    say("report: ", path)
