"""Triton kernels for large products of half precision, whose tiles the chip's copy engine moves.

For NVIDIA's Hopper and later: tensor descriptors take the addresses off the threads, and one program works
through many tiles, so that it loads the next one while it stores the last.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mingle.kernels import launches, tile_rule, tiles
from mingle.kernels.gated_experts.common import finish, swizzled


@triton.jit(do_not_specialize=["N", "group", "programs"])
def shrink_kernel(
    x_desc, a_desc,  # [N, K], [R, K]
    z_ptr, stride_zg,  # [G, T] fp32
    kept_desc,  # H [N, R]: written where KEEP, read where SUMS
    gated_desc,  # z ⊙ H [N, R]
    sums_ptr,  # [N, T] fp32, written where SUMS
    N, K, R, T, group, programs,
    RANK: tl.constexpr, UNIT: tl.constexpr, KEEP: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x A_catᵀ and its product with the gates; with SUMS also the row sums of x A_catᵀ ⊙ H per expert."""
    row_tiles, column_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(R, BLOCK_C)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=True):
        row_tile, column_tile = swizzled(tile, row_tiles, column_tiles, 8)
        row, column = row_tile * BLOCK_N, column_tile * BLOCK_C
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for k in range(0, K, BLOCK_K):
            x, a = x_desc.load([row, k]), a_desc.load([column, k])
            acc = tl.dot(x, a.T, acc)  # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_C]
        rows = row + tl.arange(0, BLOCK_N)
        row_ok = (rows < N)[:, None]
        z_rows = z_ptr + (rows // group).to(tl.int64)[:, None] * stride_zg
        if KEEP:
            kept_desc.store([row, column], acc.to(kept_desc.dtype))
        # One gate for every piece of UNIT columns, which are all of one expert.
        PIECES: tl.constexpr = BLOCK_C // UNIT
        experts = (column + tl.arange(0, PIECES) * UNIT) // RANK
        ok = row_ok & (experts < T)[None, :]
        z = tl.load(z_rows + experts[None, :], mask=ok, other=0.0)
        each = tl.reshape(acc, [BLOCK_N, PIECES, UNIT])
        if SUMS:  # a piece is an expert
            h = tl.reshape(kept_desc.load([row, column]).to(tl.float32), [BLOCK_N, PIECES, UNIT])
            places = sums_ptr + rows.to(tl.int64)[:, None] * T + experts[None, :]
            tl.store(places, tl.sum(each * h, 2), mask=ok)
        acc = tl.reshape(each * z[:, :, None], [BLOCK_N, BLOCK_C])
        gated_desc.store([row, column], acc.to(gated_desc.dtype))


@triton.jit(do_not_specialize=["N", "group", "programs"])
def expand_kernel(
    x_desc, w_desc,  # [N, K]; [O, K], or [K, O] where not W_ROWS
    h_desc, up_desc,  # z ⊙ H [N, R], [R, O]
    bias_ptr, share_ptr, gate_ptr, stride_gt, stride_go, mask_ptr,  # see `finish`
    y_desc,  # [N, O]
    N, K, O, R, T, group, programs,
    W_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHARE: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + (z ⊙ H) up + b [+ share · gate]."""
    row_tiles, column_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(O, BLOCK_O)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs):
        row_tile, column_tile = swizzled(tile, row_tiles, column_tiles, 8)
        row, column = row_tile * BLOCK_N, column_tile * BLOCK_O
        acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])
            if W_ROWS:
                acc = tl.dot(x, w_desc.load([column, k]).T, acc)  # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_O]
            else:
                acc = tl.dot(x, w_desc.load([k, column]), acc)
        for k in range(0, R, BLOCK_K):
            acc = tl.dot(h_desc.load([row, k]), up_desc.load([k, column]), acc)
        acc = finish(
            acc, row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_O),
            bias_ptr, share_ptr, gate_ptr, stride_gt, stride_go, mask_ptr, N, O, T, group,
            HAS_BIAS, HAS_SHARE, HAS_MASK, "ieee",
        )  # fmt: skip
        y_desc.store([row, column], acc.to(y_desc.dtype))


def flat(x: torch.Tensor, factors: torch.Tensor, *others: torch.Tensor) -> torch.Tensor | None:
    """`factors` [T, r, d] as [T·r, d], where descriptors can take it, x and `others` [n, d]; else None.

    A matrix in `others` may be a transposed one.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return None
    experts, rank, width = factors.shape
    if factors.stride(0) != rank * factors.stride(1) and experts > 1:
        return None
    if experts * rank % (16 // x.element_size()):  # rows of H
        return None
    joined = factors.as_strided((experts * rank, width), factors.stride()[1:])
    sides = (other if other.stride(1) == 1 else other.mT for other in others)
    return joined if all(map(_describable, (x, joined, *sides))) else None


def _describable(matrix: torch.Tensor) -> bool:
    """Rows of numbers side by side that begin at multiples of 16 bytes."""
    unit = 16 // matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) % unit == 0 and matrix.shape[1] % unit == 0
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] and aligned


def gates_by_expert(rank: int) -> bool:
    """Whether experts of that rank consist of pieces that are wide enough to have a gate each.

    A gate for every column, or for two or four, takes more registers and shared memory than there are.
    """
    return _power_of_2(rank) >= 8


def sums_by_expert(rank: int) -> bool:
    """Whether a tile holds all columns of its experts, so that their sums are complete."""
    return gates_by_expert(rank) and min(tile.columns for tile in tile_rule.DESCRIBED) % rank == 0


def _power_of_2(number: int) -> int:
    """The largest that divides `number`."""
    return number & -number


def _programs(tokens: int, columns: int, tile: tiles.Tile, chip: tiles.Chip) -> int:
    return min(chip.multiprocessors, tiles.cdiv(tokens, tile.rows) * tiles.cdiv(columns, tile.columns))


def _described(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def shrink(
    x: torch.Tensor,
    joined: torch.Tensor,
    z: torch.Tensor,
    group: int,
    kept: torch.Tensor | None,
    gated: torch.Tensor,
    hidden: torch.Tensor | None,
    sums: torch.Tensor | None,
    rank: int,
    tile: tiles.Tile,
) -> None:
    """Fill `gated` [N, R] with z ⊙ (x joinedᵀ).

    Args:
        x: [N, K].
        joined: [R, K], what `flat` returned.
        z: [G, T] fp32, contiguous columns.
        kept: gets x joinedᵀ [N, R].
        hidden, sums: H [N, R], and what gets the row sums [N, T] fp32 of x joinedᵀ ⊙ H per expert.
        rank, tile: r, for which `gates_by_expert`, and for `sums` `sums_by_expert`; and a tile.
    """
    assert sums is None or tile.columns % rank == 0
    (tokens, width), columns = x.shape, len(joined)
    shape = (tile.rows, tile.columns)
    given = kept if hidden is None else hidden
    programs = _programs(tokens, columns, tile, tiles.chip(x.device))
    launches.launch(
        shrink_kernel, (programs,),
        _described(x, tile.rows, tile.depth), _described(joined, tile.columns, tile.depth),
        z, z.stride(0), None if given is None else _described(given, *shape), _described(gated, *shape), sums,
        tokens, width, columns, columns // rank, group, programs,
        RANK=rank, UNIT=min(_power_of_2(rank), tile.columns), KEEP=kept is not None, SUMS=sums is not None,
        BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_K=tile.depth, **tiles.options(tile),
    )  # fmt: skip


def expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    gated: torch.Tensor,
    joined: torch.Tensor,
    rest: tuple[Any, ...],
    y: torch.Tensor,
    experts: int,
    group: int,
    has: dict[str, bool],
    tile: tiles.Tile,
) -> None:
    """Fill y [N, O] with x weightᵀ + gated joined, finished with `rest` as `has` says.

    Args:
        x: [N, K].
        weight: [O, K], or a transposed [K, O].
        gated, joined: [N, R], and [R, O] as `flat` returned it.
    """
    (tokens, width), (outputs, _) = x.shape, weight.shape
    by_rows = weight.stride(1) == 1
    side = (
        _described(weight, tile.columns, tile.depth)
        if by_rows
        else _described(weight.mT, tile.depth, tile.columns)
    )
    programs = _programs(tokens, outputs, tile, tiles.chip(x.device))
    launches.launch(
        expand_kernel, (programs,),
        _described(x, tile.rows, tile.depth), side,
        _described(gated, tile.rows, tile.depth), _described(joined, tile.depth, tile.columns),
        *rest, _described(y, tile.rows, tile.columns),
        tokens, width, outputs, len(joined), experts, group, programs,
        W_ROWS=by_rows, **has,
        BLOCK_N=tile.rows, BLOCK_O=tile.columns, BLOCK_K=tile.depth, **tiles.options(tile),
    )  # fmt: skip
