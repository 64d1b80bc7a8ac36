"""Tiles as a new process finds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def own_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No tile is committed, none was found before, and what a search finds stays in the test's own folder."""
    from chips import forget

    from mingle.kernels import tiles

    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles, "COMMITTED", {})
    forget()
    yield
    forget()
