"""The tiles that Triton kernels may run with, and the model of a chip that says which of them is fastest."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from mingle.kernels.chips import Chip, family


class Tile(NamedTuple):
    """One program's block of the output, and how it is computed."""

    rows: int
    columns: int
    depth: int  # of one step of the inner loop
    warps: int
    stages: int  # of the software pipeline
    splits: int = 1  # programs that share the inner products of a block
    described: bool = False  # moved by tensor descriptors


# Largest first.  None of them spills registers in any kernel on the targets of the offline compilation, and
# that is what limits them: an accumulator of 128 × 256 takes 128 of a thread's 255 registers on sm_90 and
# leaves room only because wgmma reads operands from shared memory; IEEE fp32 products run on the ordinary
# units and need registers for both operands.
_TILES = {
    "half": [
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(32, 64, 64, 4, 4),
        Tile(16, 64, 64, 4, 4),
        Tile(16, 32, 64, 4, 4),
    ],
    "tf32": [
        Tile(128, 128, 32, 8, 3),
        Tile(64, 64, 32, 8, 4),
        Tile(32, 64, 32, 4, 4),
        Tile(16, 64, 32, 4, 3),
        Tile(16, 32, 32, 4, 3),
    ],
    "float32": [Tile(32, 64, 32, 8, 4), Tile(16, 32, 32, 4, 3)],
}
# Instead of all larger ones, where a launch strains the registers (see `strain`).
_STRAINED = {
    ("half", "special"): Tile(64, 128, 64, 8, 4),
    ("half", "ragged"): Tile(64, 64, 32, 8, 4),
    ("tf32", "special"): Tile(64, 64, 32, 8, 4),
    ("tf32", "ragged"): Tile(32, 64, 32, 4, 4),
}

# For launches whose operands tensor descriptors can take, on NVIDIA's Hopper and later.
DESCRIBED = [Tile(128, 256, 64, 8, 3, described=True), Tile(128, 128, 64, 8, 4, described=True)]
_SPLITS = (1, 2, 4, 8, 16)
#: of the launch that adds up what splits have computed
ADDING = Tile(16, 128, 0, 4, 2)
_MOST_ADDED = 4  # splits that a thread of such a launch has registers for

# The share of a multiprocessor's matrix rate that one program reaches alone on it, by the block's area, as
# measured on an H100 in bf16 (bench/results); where descriptors move the operands, and where threads do.
_RATES = {True: {128 * 256: 0.84, 128 * 128: 0.79}}
_RATES[False] = {128 * 256: 0.6, 128 * 128: 0.5, 64 * 128: 0.45, 64 * 64: 0.36, 32 * 64: 0.2, 16 * 64: 0.1}
_START = 2e-6  # seconds of a program before its first product and after its last
_LATENCY = 1e-6  # seconds from asking for operands to having them
_ADD = 3e-6  # seconds of a launch that adds up parts, beyond its bytes


def rule(
    kernel: str, chip: Chip, arithmetic: str, rows: int, columns: int, depth: int, form: str = "plain"
) -> Tile:
    """The tile that `seconds` holds for the fastest, with as many stages as its shared memory allows.

    Args:
        arithmetic: a dtype's name or ``"tf32"``.
        form: what `strain` says; then `` splits`` and `` described`` where these may be chosen.
    """
    if chip.kind == "interpreter":
        return Tile(16, 32, 16, 4, 1)  # small, so that small tensors span several tiles
    strain, *may = form.split()
    widest = max(32, next_power_of_2(columns))  # beyond it a tile is mostly padding
    tiles = [tile for tile in allowed(arithmetic, strain) if fits(kernel, chip, tile)]
    if "splits" in may:
        tiles = [
            tile._replace(splits=splits)
            for tile in tiles
            for splits in _SPLITS
            if splits == 1 or splits * tile.depth <= depth
        ]
    if kernel == "upstream" and "described" in may:  # else it goes expert by expert
        tiles = [tile for tile in tiles if tile.columns <= 64]
    if "described" in may:
        tiles += by_descriptors(kernel, chip, arithmetic)
    tiles = [tile for tile in tiles if tile.rows <= rows and tile.columns <= widest] or tiles[-1:]
    tile = min(tiles, key=lambda tile: seconds(tile, chip, arithmetic, rows, columns, depth))
    if chip.kind == "hip":
        return tile._replace(depth=32, stages=2)  # 64 KB of shared memory
    if chip.capability >= 120 and tile.rows * tile.columns == 64 * 128:
        tile = tile._replace(warps=8)  # with 4, ptxas gives a thread 168 registers and spills 20 bytes
    stages = min(tile.stages, chip.shared_memory // stage_bytes(tile, arithmetic))
    return tile._replace(stages=max(2, stages))


def adding(splits: int) -> Tile:
    """The tile of a launch that adds up `splits` parts, all of which it asks for at once."""
    return ADDING if splits <= _MOST_ADDED else ADDING._replace(warps=8)


def seconds(tile: Tile, chip: Chip, arithmetic: str, rows: int, columns: int, depth: int) -> float:
    """The modelled time of a product [rows, depth] · [depth, columns] on `chip`, in waves of programs."""
    speed, itemsize = family(chip), _itemsize(arithmetic)
    row_tiles, column_tiles = cdiv(rows, tile.rows), cdiv(columns, tile.columns)
    waves = cdiv(row_tiles * column_tiles * tile.splits, chip.multiprocessors)
    steps = cdiv(depth, tile.splits * tile.depth)
    rates = _RATES[tile.described]
    area = tile.rows * tile.columns
    products = 2 * area * tile.depth / (rates.get(area, area / 16384 * 0.5) * speed.matrix * 2 / itemsize)
    # as many steps are asked for at once as there are stages, by as many programs as one processor holds
    together = max(1, chip.shared_memory // (tile.stages * stage_bytes(tile, arithmetic)))
    loads = _LATENCY / (tile.stages - 1) / together
    moved = (rows * column_tiles + columns * row_tiles) * depth * itemsize
    time = max(waves * steps * max(products, loads) + _START, moved / (3 * speed.bandwidth))
    if tile.splits > 1:
        time += _ADD + (2 * tile.splits * 4 + itemsize) * rows * columns / (3 * speed.bandwidth)
    return time


def allowed(arithmetic: str, strain: str = "plain") -> list[Tile]:
    units = arithmetic if arithmetic in _TILES else "half"
    largest = _STRAINED.get((units, strain))
    if largest is None:
        return _TILES[units]
    size, depth = largest.rows * largest.columns, largest.depth
    smaller = (tile for tile in _TILES[units] if tile.rows * tile.columns < size)
    return [largest, *(tile._replace(depth=min(tile.depth, depth)) for tile in smaller)]


def by_descriptors(kernel: str, chip: Chip, arithmetic: str) -> list[Tile]:
    """Tiles that descriptors move; sums of H in a tile take the memory of one more."""
    able = chip.kind == "cuda" and chip.capability >= 90 and chip.shared_memory > 220_000
    if not able or kernel == "fold" or _itemsize(arithmetic) > 2:
        return []
    return DESCRIBED[1:] if kernel == "upstream" else DESCRIBED


def stage_bytes(tile: Tile, arithmetic: str) -> int:
    """Shared memory of one pipeline stage: both operands of one step."""
    return (tile.rows + tile.columns) * tile.depth * _itemsize(arithmetic)


def _itemsize(arithmetic: str) -> int:
    return 4 if arithmetic in ("float32", "tf32") else 2


def fits(kernel: str, chip: Chip, tile: Tile) -> bool:
    """Whether registers hold the tile.

    128 × 256 takes wgmma or tensor memory, and is too large for the fold, which gates the larger operand.  On
    cards of capability 12.0 there is no room for 128 × 128 beside what upstream holds of an expert.
    """
    large = chip.kind == "cuda" and 90 <= chip.capability < 120 and kernel != "fold"
    most = 64 * 128 if kernel == "upstream" and chip.capability >= 120 else 128 * 128
    return tile.rows * tile.columns <= most or large


def candidates(kernel: str, chip: Chip, arithmetic: str) -> list[Tile]:
    """What `search` tries: every tile of the rule that fits, at two depths and two to four stages.

    Also with inner products in four parts, and the tiles for descriptors; a launch that can't have these
    takes the tile without.
    """
    variants = (
        tile._replace(depth=depth, stages=stages, splits=splits)
        for tile in allowed(arithmetic)
        if fits(kernel, chip, tile)
        for depth in (32, 64)
        for stages in (2, 3, 4)
        for splits in (1, 4)
    )
    every = itertools.chain(variants, by_descriptors(kernel, chip, arithmetic))
    return [tile for tile in every if tile.stages * stage_bytes(tile, arithmetic) <= chip.shared_memory]


def cdiv(count: int, size: int) -> int:
    """How many blocks of `size` hold `count` of anything.  (Triton's own takes microseconds on the host.)"""
    return -(-count // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number` ≥ 1."""
    return 1 << (number - 1).bit_length()


def rank_block(rank: int, limit: int) -> int:
    """Ranks of one step over an expert: a power of two, at least the 16 that a matrix instruction takes."""
    return min(max(16, next_power_of_2(rank)), limit)
