"""A run that was made up, and its page; merges to be tried out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import played_merges
import pytest
import torch
from fabricated_runs import TASKS, comparison
from html_document import Document
from PIL import Image
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


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives a saved merge of image classifiers by its method."""
    folders: dict[str, Path] = {}

    def saved(method: str) -> Path:
        if method not in folders:
            place = tmp_path_factory.mktemp(method)
            torch.manual_seed(0)
            played_merges.classifier(place, "vit", method).save_pretrained(place / "merged")
            folders[method] = place / "merged"
        return folders[method]

    return saved
