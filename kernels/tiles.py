"""Tile sizes of the Triton kernels: a committed table, a rule for everything else, and a search on demand.

No kernel is ever timed at its first call.  `choose` looks up a tile found by `search` for this user and GPU,
then the committed table, then follows the rule: the largest tile whose grid still fills the chip.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from mingle.kernels.store import Store

logger = logging.getLogger(__name__)


class Tile(NamedTuple):
    """One program's block of the output, and how it is computed."""

    rows: int
    columns: int
    depth: int  # of one step of the inner loop
    warps: int
    stages: int  # of the software pipeline


class Chip(NamedTuple):
    """What the rule needs to know of a processor."""

    kind: str  # "cuda", "hip" or "interpreter"
    name: str
    capability: int  # major · 10 + minor
    multiprocessors: int
    shared_memory: int  # bytes that one block may use


INTERPRETER = Chip("interpreter", "interpreter", 0, 1, 1 << 20)

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

# Tiles measured faster than the rule's, by `_key`; see bench/results.
COMMITTED: dict[str, Tile] = {}

_override: contextvars.ContextVar[Tile | None] = contextvars.ContextVar("tile", default=None)


@cache
def chip(device: torch.device) -> Chip:
    """The chip behind a device; CPU tensors run in Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    kind = "hip" if torch.version.hip else "cuda"
    capability = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", 1 << 16)
    return Chip(kind, properties.name, capability, properties.multi_processor_count, shared)


def bucket(tokens: int) -> int:
    """Token counts that share a configuration: powers of two, none below 16."""
    return max(16, 1 << (tokens - 1).bit_length())


def strain(tensors: Iterable[torch.Tensor], sizes: Iterable[int], special: bool) -> str:
    """How much a launch asks of the registers beyond its tile.

    ``"ragged"``: rows that are not whole 32-byte pieces are loaded number by number, each with an address of
    its own; ``"special"``: some other extra, such as ranks that do not fill a step, gates that are wider than
    x, or zeros that are skipped; else ``"plain"``.
    """
    tensors = list(tensors)
    lengths = [*sizes, *(stride for tensor in tensors for stride in tensor.stride() if stride != 1)]
    if any(length % 16 for length in lengths) or any(1 not in tensor.stride() for tensor in tensors):
        return "ragged"
    return "special" if special else "plain"


def choose(
    kernel: str, x: torch.Tensor, tokens: int, columns: int, depth: int, strain: str = "plain"
) -> Tile:
    """The tile for one launch.

    Args:
        kernel: ``"shrink"``, ``"expand"``, ``"upstream"`` or ``"fold"``.
        x: any operand; its device and dtype count.
        tokens: rows of the output.
        columns: columns of the output.
        depth: length of the inner products, all that a tile sums up.
        strain: see `strain`.
    """
    forced = _override.get()
    if forced is not None:
        return forced
    return _choose(kernel, chip(x.device), _arithmetic(x), bucket(tokens), columns, depth, strain)


def _arithmetic(x: torch.Tensor) -> str:
    """What the products run in: the dtype's name, or ``"tf32"``."""
    if x.dtype == torch.float32 and precision(x) == "tf32":
        return "tf32"
    return str(x.dtype).removeprefix("torch.")


@cache
def _choose(
    kernel: str, chip: Chip, arithmetic: str, rows: int, columns: int, depth: int, strain: str
) -> Tile:
    key = _key(kernel, chip, arithmetic, rows, columns, depth, strain)
    stored = store().get(key)
    if (
        isinstance(stored, (list, tuple))
        and len(stored) == len(Tile._fields)
        and all(isinstance(number, int) for number in stored)
    ):
        return Tile(*stored)
    return COMMITTED.get(key) or rule(kernel, chip, arithmetic, rows, columns, strain)


def _key(kernel: str, chip: Chip, arithmetic: str, rows: int, columns: int, depth: int, strain: str) -> str:
    return f"{chip.name}, {kernel} {arithmetic} {rows}x{columns}x{depth} {strain}"


def rule(kernel: str, chip: Chip, arithmetic: str, rows: int, columns: int, strain: str = "plain") -> Tile:
    """The largest tile whose grid fills the chip, as deep as its shared memory allows.

    `arithmetic` is a dtype's name or ``"tf32"``.
    """
    if chip.kind == "interpreter":
        return Tile(16, 32, 16, 4, 1)  # small, so that small tensors span several tiles
    widest = max(32, triton.next_power_of_2(columns))  # beyond it a tile is mostly padding
    tiles = [
        tile
        for tile in _tiles(arithmetic, strain)
        if _fits(kernel, chip, tile) and tile.rows <= rows and tile.columns <= widest
    ]
    filling = [
        tile
        for tile in tiles
        if math.ceil(rows / tile.rows) * math.ceil(columns / tile.columns) >= 0.9 * chip.multiprocessors
    ]
    tile = (filling or tiles[-1:])[0]
    if chip.kind == "hip":
        return tile._replace(depth=32, stages=2)  # 64 KB of shared memory
    stages = min(tile.stages, chip.shared_memory // _stage_bytes(tile, arithmetic))
    return tile._replace(stages=max(2, stages))


def _tiles(arithmetic: str, strain: str = "plain") -> list[Tile]:
    units = arithmetic if arithmetic in _TILES else "half"
    largest = _STRAINED.get((units, strain))
    if largest is None:
        return _TILES[units]
    size = largest.rows * largest.columns
    return [largest, *(tile for tile in _TILES[units] if tile.rows * tile.columns < size)]


def _stage_bytes(tile: Tile, arithmetic: str) -> int:
    """Shared memory of one pipeline stage: both operands of one step."""
    return (tile.rows + tile.columns) * tile.depth * (4 if arithmetic in ("float32", "tf32") else 2)


def _fits(kernel: str, chip: Chip, tile: Tile) -> bool:
    """Whether registers hold the tile.

    128 × 256 takes wgmma or tensor memory, and is too large for the fold, which gates the larger operand.
    """
    large = chip.kind == "cuda" and 90 <= chip.capability < 120 and kernel != "fold"
    return tile.rows * tile.columns <= 128 * 128 or large


def rank_block(rank: int, limit: int) -> int:
    """Ranks of one step over an expert: a power of two, at least the 16 that a matrix instruction takes."""
    return min(max(16, triton.next_power_of_2(rank)), limit)


def precision(x: torch.Tensor) -> str:
    """How `tl.dot` treats fp32 operands: IEEE, unless the user allowed TF32 for CUDA matrix products."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def options(tile: Tile) -> dict[str, int]:
    """What the compiler is told of a launch.

    Fused multiply-adds are named because Triton 3.9 warns where their default decides.
    """
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


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
    """What `search` tries: every tile of the rule, at two depths and two to four stages, that fits."""
    variants = (
        tile._replace(depth=depth, stages=stages)
        for tile in _tiles(arithmetic)
        if _fits(kernel, chip, tile)
        for depth in (32, 64)
        for stages in (2, 3, 4)
    )
    return [tile for tile in variants if tile.stages * _stage_bytes(tile, arithmetic) <= chip.shared_memory]


@contextlib.contextmanager
def _forced(tile: Tile) -> Iterator[None]:
    token = _override.set(tile)
    try:
        yield
    finally:
        _override.reset(token)


def search(
    kernel: str,
    x: torch.Tensor,
    tokens: int,
    columns: int,
    depth: int,
    launch: Callable[[], object],
    time: Callable[[Callable[[], object]], float],
    tiles: Iterable[Tile] | None = None,
    strain: str = "plain",
) -> Tile:
    """Time `launch` under every candidate tile, keep the fastest for this user and GPU, and return it.

    Args:
        kernel, x, tokens, columns, depth, strain: as for `choose`, which returns the found tile from now on.
        launch: runs the kernel once, through its launcher.
        time: seconds of one call of its argument, such as a wrapper of ``triton.testing.do_bench``.
        tiles: candidates other than `candidates`.

    Raises:
        RuntimeError: no candidate could be launched.
    """
    own, arithmetic = chip(x.device), _arithmetic(x)
    timed: dict[Tile, float] = {}
    for tile in candidates(kernel, own, arithmetic) if tiles is None else tiles:
        with _forced(tile):
            try:
                timed[tile] = time(launch)
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
                logger.info("%s with %s: %s", kernel, tile, error)
    if not timed:
        raise RuntimeError(f"{kernel}: no tile could be launched on {own.name}")
    best = min(timed, key=timed.__getitem__)
    store().put(_key(kernel, own, arithmetic, bucket(tokens), columns, depth, strain), best)
    _choose.cache_clear()
    return best
