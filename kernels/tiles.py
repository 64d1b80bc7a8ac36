"""Tile sizes of the Triton kernels: a committed table, a rule for everything else, and a search on demand.

No kernel is ever timed at its first call.  `choose` looks up a tile found by `search` for this user and GPU,
then the committed table, then follows the rule: the tile that a model of the chip holds for the fastest.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from mingle.kernels.chips import INTERPRETER as INTERPRETER
from mingle.kernels.chips import Chip as Chip
from mingle.kernels.chips import chip as chip
from mingle.kernels.chips import family
from mingle.kernels.store import Store

logger = logging.getLogger(__name__)


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
    ("tf32", "ragged"): Tile(32, 64, 32, 4, 4),
}

# For launches whose operands tensor descriptors can take, on NVIDIA's Hopper and later.
_DESCRIBED = [Tile(128, 256, 64, 8, 3, described=True), Tile(128, 128, 64, 8, 4, described=True)]
_SPLITS = (1, 2, 4, 8, 16)
#: of the launch that adds up what splits have computed
ADDING = Tile(16, 128, 0, 4, 2)

# The share of a multiprocessor's matrix rate that one program reaches alone on it, by the block's area, as
# measured on an H100 in bf16 (bench/results); where descriptors move the operands, and where threads do.
_RATES = {True: {128 * 256: 0.84, 128 * 128: 0.79}}
_RATES[False] = {128 * 256: 0.6, 128 * 128: 0.5, 64 * 128: 0.45, 64 * 64: 0.36, 32 * 64: 0.2, 16 * 64: 0.1}
_START = 2e-6  # seconds of a program before its first product and after its last
_LATENCY = 1e-6  # seconds from asking for operands to having them
_ADD = 3e-6  # seconds of a launch that adds up parts, beyond its bytes

# Tiles measured faster than the rule's, by `_key`; see bench/results.
COMMITTED: dict[str, Tile] = {}


class _Forced:
    """The tile of a search, and the keys of the launches that got it."""

    def __init__(self, tile: Tile) -> None:
        self.tile, self.keys = tile, set[str]()


_override: contextvars.ContextVar[_Forced | None] = contextvars.ContextVar("tile", default=None)
_searches = 0  # that are over


def bucket(tokens: int) -> int:
    """Token counts that share a configuration: powers of two, none below 16."""
    return max(16, next_power_of_2(tokens))


def strain(tensors: Iterable[torch.Tensor], sizes: Iterable[int], special: bool) -> str:
    """How much a launch asks of the registers beyond its tile.

    ``"ragged"``: rows that are not whole 32-byte pieces, or do not begin at multiples of 16 bytes, are loaded
    number by number, each with an address of its own; ``"special"``: some other extra, such as ranks that do
    not fill a step; else ``"plain"``.
    """
    tensors = list(tensors)
    lengths = [*sizes, *(stride for tensor in tensors for stride in tensor.stride() if stride != 1)]
    slow = any(1 not in tensor.stride() or tensor.data_ptr() % 16 for tensor in tensors)
    if slow or any(length % 16 for length in lengths):
        return "ragged"
    return "special" if special else "plain"


def choose(
    kernel: str,
    x: torch.Tensor,
    tokens: int,
    columns: int,
    depth: int,
    strain: str = "plain",
    *,
    splits: bool = False,
    described: bool = False,
) -> Tile:
    """The tile for one launch.

    Args:
        kernel: ``"shrink"``, ``"expand"``, ``"upstream"`` or ``"fold"``.
        x: any operand; its device and dtype count.
        tokens: rows of the output.
        columns: columns of the output.
        depth: length of the inner products, all that a tile sums up.
        strain: see `strain`.
        splits: whether programs may share the inner products of a tile.
        described: whether tensor descriptors can take the operands.
    """
    form = strain + "".join(name for name, may in ((" splits", splits), (" described", described)) if may)
    launch = kernel, chip(x.device), _arithmetic(x), bucket(tokens), columns, depth, form
    forced = _override.get()
    if forced is None:
        return _choose(*launch)
    forced.keys.add(_key(*launch))
    tile = forced.tile
    return tile._replace(splits=tile.splits if splits else 1, described=tile.described and described)


def listed(kernel: str, x: torch.Tensor, tokens: int, columns: int, strain: str = "plain") -> Tile:
    """The tile of a launch that passes over zero gates.

    Its rows depend on the number of tokens alone: for all kernels that see one list of active experts.
    """
    own = chip(x.device)
    if own.kind == "interpreter":
        return Tile(16, 32 if kernel == "expand" else rank_block(columns, 16), 16, 4, 1)
    rows = 128 if tokens >= 64 * own.multiprocessors else 64 if tokens >= 512 else 16
    arithmetic = _arithmetic(x)
    rows = min(rows, max(tile.rows for tile in _tiles(arithmetic, strain)))
    tile = next(tile for tile in _tiles(arithmetic, strain) if tile.rows == rows and _fits(kernel, own, tile))
    if kernel == "shrink":
        tile = tile._replace(columns=rank_block(columns, 64))
    stages = 2 if own.kind == "hip" else min(tile.stages, own.shared_memory // _stage_bytes(tile, arithmetic))
    return tile._replace(depth=32 if own.kind == "hip" else tile.depth, stages=max(2, stages))


def shares(depth: int, tile: Tile) -> tuple[int, int]:
    """How many programs share inner products of length `depth`, and how much each takes, in whole steps."""
    part = cdiv(depth, tile.splits * tile.depth) * tile.depth
    return cdiv(depth, part), part


def _arithmetic(x: torch.Tensor) -> str:
    """What the products run in: the dtype's name, or ``"tf32"``."""
    if x.dtype == torch.float32 and precision(x) == "tf32":
        return "tf32"
    return str(x.dtype).removeprefix("torch.")


@cache
def _choose(kernel: str, chip: Chip, arithmetic: str, rows: int, columns: int, depth: int, form: str) -> Tile:
    key = _key(kernel, chip, arithmetic, rows, columns, depth, form)
    stored = store().get(key)
    if (
        isinstance(stored, (list, tuple))
        and len(stored) == len(Tile._fields)
        and all(isinstance(number, int) for number in stored)
    ):
        return Tile(*stored)
    return COMMITTED.get(key) or rule(kernel, chip, arithmetic, rows, columns, depth, form)


def _key(kernel: str, chip: Chip, arithmetic: str, rows: int, columns: int, depth: int, form: str) -> str:
    return f"{chip.name}, {kernel} {arithmetic} {rows}x{columns}x{depth} {form}"


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
    tiles = [tile for tile in _tiles(arithmetic, strain) if _fits(kernel, chip, tile)]
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
        tiles += _described(kernel, chip, arithmetic)
    tiles = [tile for tile in tiles if tile.rows <= rows and tile.columns <= widest] or tiles[-1:]
    tile = min(tiles, key=lambda tile: seconds(tile, chip, arithmetic, rows, columns, depth))
    if chip.kind == "hip":
        return tile._replace(depth=32, stages=2)  # 64 KB of shared memory
    stages = min(tile.stages, chip.shared_memory // _stage_bytes(tile, arithmetic))
    return tile._replace(stages=max(2, stages))


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
    together = max(1, chip.shared_memory // (tile.stages * _stage_bytes(tile, arithmetic)))
    loads = _LATENCY / (tile.stages - 1) / together
    moved = (rows * column_tiles + columns * row_tiles) * depth * itemsize
    time = max(waves * steps * max(products, loads) + _START, moved / (3 * speed.bandwidth))
    if tile.splits > 1:
        time += _ADD + (2 * tile.splits * 4 + itemsize) * rows * columns / (3 * speed.bandwidth)
    return time


def _tiles(arithmetic: str, strain: str = "plain") -> list[Tile]:
    units = arithmetic if arithmetic in _TILES else "half"
    largest = _STRAINED.get((units, strain))
    if largest is None:
        return _TILES[units]
    size = largest.rows * largest.columns
    return [largest, *(tile for tile in _TILES[units] if tile.rows * tile.columns < size)]


def _described(kernel: str, chip: Chip, arithmetic: str) -> list[Tile]:
    """Tiles that descriptors move; sums of H in a tile take the memory of one more."""
    able = chip.kind == "cuda" and chip.capability >= 90 and chip.shared_memory > 220_000
    if not able or kernel == "fold" or _itemsize(arithmetic) > 2:
        return []
    return _DESCRIBED[1:] if kernel == "upstream" else _DESCRIBED


def _stage_bytes(tile: Tile, arithmetic: str) -> int:
    """Shared memory of one pipeline stage: both operands of one step."""
    return (tile.rows + tile.columns) * tile.depth * _itemsize(arithmetic)


def _itemsize(arithmetic: str) -> int:
    return 4 if arithmetic in ("float32", "tf32") else 2


def _fits(kernel: str, chip: Chip, tile: Tile) -> bool:
    """Whether registers hold the tile.

    128 × 256 takes wgmma or tensor memory, and is too large for the fold, which gates the larger operand.
    """
    large = chip.kind == "cuda" and 90 <= chip.capability < 120 and kernel != "fold"
    return tile.rows * tile.columns <= 128 * 128 or large


def cdiv(count: int, size: int) -> int:
    """How many blocks of `size` hold `count` of anything.  (Triton's own takes microseconds on the host.)"""
    return -(-count // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number` ≥ 1."""
    return 1 << (number - 1).bit_length()


def rank_block(rank: int, limit: int) -> int:
    """Ranks of one step over an expert: a power of two, at least the 16 that a matrix instruction takes."""
    return min(max(16, next_power_of_2(rank)), limit)


def precision(x: torch.Tensor) -> str:
    """How `tl.dot` treats fp32 operands: IEEE, unless the user allowed TF32 for CUDA matrix products."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def options(tile: Tile) -> dict[str, int]:
    """What the compiler is told of a launch.

    Fused multiply-adds are named because Triton 3.9 warns where their default decides.
    """
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def launched(kernel: str, tile: Tile, run: Callable[[Tile], None], rows: bool = True) -> None:
    """`run` with `tile`, or with the next smaller one that the chip has the memory for.

    That is remembered, and told once.  `rows`: whether a tile may get fewer rows.
    """
    tile = _smaller.get((kernel, tile), tile)
    wanted = tile
    while True:
        try:
            run(tile)
        except triton.runtime.errors.OutOfResources as error:
            less = _less(tile, rows)
            if less is None or _override.get() is not None:  # a search has to know
                raise
            logger.info("%s with %s: %s", kernel, tile, error)
            tile = less
            continue
        if tile != wanted:
            _smaller[kernel, wanted] = tile
            logger.warning("%s: %s needs more than this chip has; %s takes its place", kernel, wanted, tile)
        return


_smaller: dict[tuple[str, Tile], Tile] = {}


def _less(tile: Tile, rows: bool) -> Tile | None:
    """A tile that needs less shared memory: without descriptors, with fewer stages, columns or rows."""
    if tile.described:
        return tile._replace(described=False)
    if tile.stages > 2:
        return tile._replace(stages=tile.stages - 1)
    if tile.columns > 32:
        return tile._replace(columns=tile.columns // 2)
    return tile._replace(rows=tile.rows // 2) if rows and tile.rows > 16 else None


def addressable(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """`tensor`, or a copy where offsets along `dims` exceed the 32 bits that kernels count them with."""
    far = any(tensor.shape[dim] * tensor.stride(dim) >= 2**31 for dim in dims)
    return tensor.contiguous() if far else tensor


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@cache
def store() -> Store:
    return Store(f"tiles-triton{triton.__version__}.json")


def candidates(kernel: str, chip: Chip, arithmetic: str) -> list[Tile]:
    """What `search` tries: every tile of the rule that fits, at two depths and two to four stages.

    Also with inner products in four parts, and the tiles for descriptors; a launch that can't have these
    takes the tile without.
    """
    variants = (
        tile._replace(depth=depth, stages=stages, splits=splits)
        for tile in _tiles(arithmetic)
        if _fits(kernel, chip, tile)
        for depth in (32, 64)
        for stages in (2, 3, 4)
        for splits in (1, 4)
    )
    every = itertools.chain(variants, _described(kernel, chip, arithmetic))
    return [tile for tile in every if tile.stages * _stage_bytes(tile, arithmetic) <= chip.shared_memory]


@contextlib.contextmanager
def _forced(tile: Tile) -> Iterator[_Forced]:
    forced = _Forced(tile)
    token = _override.set(forced)
    try:
        yield forced
    finally:
        _override.reset(token)


def search(
    kernel: str,
    x: torch.Tensor,
    launch: Callable[[], object],
    time: Callable[[Callable[[], object]], float],
    tiles: Iterable[Tile] | None = None,
) -> Tile:
    """Time `launch` under every candidate tile, keep the fastest for this user and GPU, and return it.

    Args:
        kernel, x: as for `choose`.
        launch: runs the kernel once, through its launcher, which gets the found tile from now on.
        time: seconds of one call of its argument, such as a wrapper of ``triton.testing.do_bench``.
        tiles: candidates other than `candidates`.

    Raises:
        RuntimeError: no candidate could be launched.
    """
    own, arithmetic = chip(x.device), _arithmetic(x)
    timed: dict[Tile, float] = {}
    keys = set[str]()
    for tile in candidates(kernel, own, arithmetic) if tiles is None else tiles:
        with _forced(tile) as forced:
            try:
                timed[tile] = time(launch)
                keys |= forced.keys
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
                logger.info("%s with %s: %s", kernel, tile, error)
    if not timed:
        raise RuntimeError(f"{kernel}: no tile could be launched on {own.name}")
    best = min(timed, key=timed.__getitem__)
    for key in keys:
        store().put(key, best)
    _choose.cache_clear()
    global _searches
    _searches += 1
    return best


def searching() -> bool:
    """Whether this is a launch of a search."""
    return _override.get() is not None


def searches() -> int:
    """How many searches are over: what was chosen before the last one may be chosen otherwise."""
    return _searches
