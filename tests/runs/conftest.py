"""A run that was made up, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest
from fabricated_runs import TASKS, comparison
from html_document import Document
from stub_suite import stub  # noqa: F401

from mingle.runs.report import page


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparison(tmp_path_factory.mktemp("runs") / "demo", TASKS)


@pytest.fixture(scope="module")
def written(compared: Path) -> Document:
    path = page.write(compared)
    assert path == compared / "report.html"
    return Document(path.read_text(encoding="utf-8"))
