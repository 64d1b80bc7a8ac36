"""Tile sizes of the Triton kernels: a committed table, a rule for everything else, and a search on demand.

No kernel is ever timed at its first call.  `choose` looks up a tile found by `search` for this user and GPU,
then the committed table, then follows the rule: the tile that the model in `tile_rule` holds for the fastest.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
import triton

from mingle.kernels import tile_rule
from mingle.kernels.chips import INTERPRETER as INTERPRETER
from mingle.kernels.chips import Chip as Chip
from mingle.kernels.chips import chip as chip
from mingle.kernels.store import Store
from mingle.kernels.tile_rule import ADDING as ADDING
from mingle.kernels.tile_rule import Tile as Tile
from mingle.kernels.tile_rule import adding as adding
from mingle.kernels.tile_rule import candidates as candidates
from mingle.kernels.tile_rule import cdiv as cdiv
from mingle.kernels.tile_rule import next_power_of_2 as next_power_of_2
from mingle.kernels.tile_rule import rank_block as rank_block
from mingle.kernels.tile_rule import rule as rule
from mingle.kernels.tile_rule import seconds as seconds

logger = logging.getLogger(__name__)


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


def listed_rows(x: torch.Tensor, tokens: int) -> int:
    """Rows that share a list of experts whose gates are not 0, whatever is launched for them."""
    own = chip(x.device)
    if own.kind == "interpreter":
        return 16
    rows = 128 if tokens >= 64 * own.multiprocessors else 64 if tokens >= 512 else 16
    return min(rows, max(tile.rows for tile in tile_rule.allowed(_arithmetic(x))))


def listed(kernel: str, x: torch.Tensor, rows: int, columns: int, strain: str = "plain") -> Tile:
    """The tile of a launch that passes over zero gates, of `rows` as `listed_rows` says, or an equal part."""
    own = chip(x.device)
    if own.kind == "interpreter":
        return Tile(16, 32 if kernel == "expand" else rank_block(columns, 16), 16, 4, 1)
    arithmetic = _arithmetic(x)
    allowed = tile_rule.allowed(arithmetic, strain)
    rows = min(rows, max(tile.rows for tile in allowed))
    tile = next(tile for tile in allowed if tile.rows == rows and tile_rule.fits(kernel, own, tile))
    if kernel == "shrink":
        tile = tile._replace(columns=rank_block(columns, 64))
    most = own.shared_memory // tile_rule.stage_bytes(tile, arithmetic)
    stages = 2 if own.kind == "hip" else min(tile.stages, most)
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
