"""A merge that takes the most room, as a file and done."""

from __future__ import annotations

from pathlib import Path

import pytest
from merge_files import merge_file

from mingle.cli import main


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def config(tmp_path, base_folder, tuned_folders) -> Path:
    experts = {f"task {i}": folder for i, folder in enumerate(tuned_folders[:2])}
    return merge_file(tmp_path, base_folder, experts, "individual")


@pytest.fixture
def merged(config, tmp_path) -> Path:
    assert main(["merge", str(config), "--out", str(tmp_path / "merged")]) == 0
    return tmp_path / "merged"
