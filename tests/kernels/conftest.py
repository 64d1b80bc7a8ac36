"""Tiles and the choice of a library for products, as a new process finds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


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


@pytest.fixture
def own_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No library was chosen before, and what is chosen stays in the test's own folder."""
    import gemm_choices

    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path))
    monkeypatch.delenv("MINGLE_CPU_GEMM", raising=False)
    gemm_choices.forget()
    yield
    gemm_choices.forget()


@pytest.fixture
def onednn(own_choice: None) -> None:
    from mingle.kernels import gemm

    if not gemm._onednn_agrees(torch.float32):
        pytest.skip("this PyTorch has no oneDNN linear operator")
