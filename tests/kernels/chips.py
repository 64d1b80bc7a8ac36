"""Chips that tiles are chosen for, and what a tile costs on them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="tiles are those of the Triton kernels")

from mingle.kernels import tiles
from mingle.kernels.tiles import Chip, Tile

H100 = Chip("cuda", "NVIDIA H100", 90, 132, 232_448)
CHIPS = {
    "H100": H100,
    "A100": Chip("cuda", "NVIDIA A100", 80, 108, 166_912),
    "A10": Chip("cuda", "NVIDIA A10", 86, 72, 101_376),
    "B200": Chip("cuda", "NVIDIA B200", 100, 148, 232_448),
    "RTX 5090": Chip("cuda", "NVIDIA GeForce RTX 5090", 120, 170, 101_376),
    "MI300X": Chip("hip", "AMD Instinct MI300X", 94, 304, 65_536),
}
KERNELS = ("shrink", "expand", "upstream", "fold")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "tf32": 4, "float32": 4}


def forget() -> None:
    tiles._choose.cache_clear()
    tiles.store.cache_clear()
    tiles._smaller.clear()


def area(tile: Tile) -> int:
    return tile.rows * tile.columns


def stage_bytes(tile: Tile, arithmetic: str) -> int:
    """Both operands of one step: [rows, depth] and [depth, columns]."""
    return (tile.rows * tile.depth + tile.depth * tile.columns) * ITEMSIZE[arithmetic]
