"""The search for tile sizes: every kernel of a case is tried, and what was found is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "examples/studies"


def test_a_search_tries_every_kernel_and_keeps_what_it_finds(tmp_path):
    """In Triton's interpreter, which has to be asked for before triton is imported."""
    pytest.importorskip("triton")
    script = """
import torch
import tile_search
from mingle.bench.gated_experts.cases import KernelCase
from mingle.kernels import tiles
small, odd = tiles.Tile(16, 16, 16, 4, 1), tiles.Tile(16, 32, 32, 4, 1)
for reduce in ("sample", "batch"):
    case = KernelCase("tiny", 2, 5, 24, 20, 2, rank=4, reduce=reduce, backward=True)
    found = tile_search.tune(case, torch.device("cpu"), [small, odd])
    print(*sorted({kernel for kernel, tile in found if tile in (small, odd)}))
x = torch.zeros(10, 24)
assert tiles.choose("shrink", x, 10, 8, 24, "ragged", splits=True) in (small, odd)
"""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "MINGLE_CACHE": str(tmp_path),
        "PYTHONPATH": str(STUDIES),
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["expand shrink upstream", "expand fold shrink upstream"]
    assert len(list(tmp_path.glob("tiles-*.json"))) == 1
