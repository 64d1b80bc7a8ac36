"""``report.html``: one page of a run, with everything that it needs in it.

    model     what a page shows
    sources   pages made of the folders that commands write
    charts, heat, cards, advice
              what is in them, as plain numbers and words
    render    the page as HTML

Names of tasks, classes and files are shown as they are, whatever they hold: the template escapes everything,
and a policy in the page forbids every script but its own, and every address.
"""

from __future__ import annotations

from pathlib import Path

from mingle.io.files import CheckpointError, write_text
from mingle.runs.report.page import sources
from mingle.runs.report.page.model import Page
from mingle.runs.report.page.render import html

__all__ = ["REPORT", "Page", "html", "of", "write"]

#: the file in a run's folder
REPORT = "report.html"


def of(folder: Path) -> Page:
    """The page of a folder that `mingle demo`, `mingle reproduce` or `mingle merge` wrote.

    Raises:
        CheckpointError: none of these wrote it, or a file in it is broken.
    """
    if (folder / "results.json").is_file():
        return sources.of_comparison(folder)
    if (folder / "table.json").is_file():
        return sources.of_table(folder)
    if sources.merged_folders(folder):
        return sources.of_merge(folder)
    expected = "results.json of demo, table.json of reproduce, or manifest.json of merge"
    raise CheckpointError(f"{folder}: holds no run; expected {expected}")


def write(folder: Path) -> Path:
    """Write the page of a folder into it, and return its path.

    Raises:
        CheckpointError: see `of`; or a folder that cannot be written to.
    """
    path = folder / REPORT
    write_text(path, html(of(folder)))
    return path
