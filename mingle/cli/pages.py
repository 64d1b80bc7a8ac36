"""``report.html`` on the command line: where it is, and ``--open``."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from mingle import ranks
from mingle.cli.output import say
from mingle.runs.report import page


def option(parser: argparse.ArgumentParser) -> None:
    """``--open``."""
    parser.add_argument(
        "--open", action="store_true", help="open report.html in the browser when it is written"
    )


def write(folder: Path, *, show: bool) -> None:
    """Write the page of a folder, in the first process of a group, and say where it is."""
    with ranks.together("writing the report"):
        if ranks.rank() == 0:
            told(page.write(folder), show=show)


def told(path: Path, *, show: bool) -> None:
    """Say where the page is, as the last line, once it was opened where that is wanted."""
    if show and not webbrowser.open(path.resolve().as_uri()):
        say("no browser could be opened")
    say("report: ", path)
