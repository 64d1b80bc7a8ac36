"""Triton kernels for H = x A_catᵀ [N, T·r] and z ⊙ H, and their launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mingle.kernels import launches, tiles
from mingle.kernels.gated_experts import descriptors
from mingle.kernels.gated_experts.active import Active
from mingle.kernels.gated_experts.common import add_product, placed
from mingle.kernels.gated_experts.listed import shrink_listed


@triton.jit(do_not_specialize=["N", "group"])
def shrink_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    a_ptr, stride_at, stride_ar, stride_ak,  # [T, r, K]
    z_ptr, stride_zg,  # [G, T] fp32
    h_ptr,  # [N, T·r]; written where KEEP
    gated_ptr,  # [N, T·r]; fp32 [splits, N, T·r] where SPLIT
    N, K, T, r, group, part,
    KEEP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """H = x A_catᵀ and z ⊙ H; with SPLIT, H over `part` of the K columns of x."""
    R = T * r
    split, row_tile, column_tile = placed(N, R, BLOCK_N, BLOCK_C)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ok, column_ok = (rows < N)[:, None], (columns < R)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    groups = (rows // group).to(tl.int64)
    first, last = 0, K
    if SPLIT:
        first, last = split * part, min((split + 1) * part, K)
    a_columns = a_ptr + ((columns // r).to(tl.int64) * stride_at + (columns % r) * stride_ar)[None, :]
    acc = add_product(
        tl.zeros([BLOCK_N, BLOCK_C], tl.float32),
        x_ptr + long_rows * stride_xn, stride_xk, a_columns, stride_ak,
        row_ok, column_ok, first, last, BLOCK_K, PRECISION,
    )  # fmt: skip
    place = long_rows * R + columns[None, :]
    ok = row_ok & column_ok
    if SPLIT:
        tl.store(gated_ptr + tl.cast(split, tl.int64) * N * R + place, acc, mask=ok)
    else:
        if KEEP:
            tl.store(h_ptr + place, acc.to(h_ptr.dtype.element_ty), mask=ok)
        z = tl.load(z_ptr + groups[:, None] * stride_zg + (columns // r)[None, :], mask=ok, other=0.0)
        tl.store(gated_ptr + place, (acc * z).to(gated_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["N", "group"])
def gate_parts_kernel(
    parts_ptr,  # [splits, N, R] fp32
    z_ptr, stride_zg,  # [G, T] fp32
    h_ptr,  # [N, R]; written where KEEP
    gated_ptr,  # [N, R]
    N, R, r, group,
    SPLITS: tl.constexpr, KEEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """H and z ⊙ H from the parts of H."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (rows < N)[:, None] & (columns < R)[None, :]
    place = rows.to(tl.int64)[:, None] * R + columns[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for split in tl.static_range(SPLITS):  # all are asked for at once
        acc += tl.load(parts_ptr + tl.cast(split, tl.int64) * N * R + place, mask=ok, other=0.0)
    if KEEP:
        tl.store(h_ptr + place, acc.to(h_ptr.dtype.element_ty), mask=ok)
    groups = (rows // group).to(tl.int64)
    z = tl.load(z_ptr + groups[:, None] * stride_zg + (columns // r)[None, :], mask=ok, other=0.0)
    tl.store(gated_ptr + place, (acc * z).to(gated_ptr.dtype.element_ty), mask=ok)


def shrink(
    x: torch.Tensor, A: torch.Tensor, z: torch.Tensor, group: int, active: Active | None, *, keep: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """H = x A_catᵀ and z ⊙ H.

    Args:
        x: [N, K], N > 0, any strides.
        A: [T, r, K], T > 0, any strides.
        z: gate values [G, T] fp32, contiguous columns.
        group: tokens per gate row.
        active: the experts to compute, where those are left out whose gates are 0 for a whole tile of rows;
            H is not kept then, and rows are positions (see `mingle.kernels.gated_experts.active`).
        keep: H is needed afterwards.

    Returns:
        H (no rows without `keep`) and z ⊙ H, both [N, T·r] in x's dtype.
    """
    if active is not None:
        return x.new_empty(0, A.shape[0] * A.shape[1]), shrink_listed(x, A, z, group, active)
    return _shrink(x, A, z, group, keep)


@launches.repeated
def _shrink(
    x: torch.Tensor, A: torch.Tensor, z: torch.Tensor, group: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    x, A = tiles.addressable(x, 1), tiles.addressable(A, 1, 2)
    (tokens, width), (experts, rank) = x.shape, A.shape[:2]
    columns = experts * rank
    hidden, gated = x.new_empty(tokens if keep else 0, columns), x.new_empty(tokens, columns)
    flat = descriptors.flat(x, A) if descriptors.gates_by_expert(rank) else None
    strain = tiles.strain((x, A), (width,), special=rank % 16 > 0)
    tile = tiles.choose("shrink", x, tokens, columns, width, strain, splits=True, described=flat is not None)

    def launch(tile: tiles.Tile) -> None:
        if tile.described and flat is not None:
            descriptors.shrink(x, flat, z, group, hidden if keep else None, gated, None, None, rank, tile)
            return
        splits, part = tiles.shares(width, tile)
        parts = gated if splits == 1 else x.new_empty(splits, tokens, columns, dtype=torch.float32)
        grid = splits * tiles.cdiv(tokens, tile.rows) * tiles.cdiv(columns, tile.columns)
        launches.launch(
            shrink_kernel, (grid,),
            x, *x.stride(), A, *A.stride(), z, z.stride(0), hidden, parts,
            tokens, width, experts, rank, group, part,
            KEEP=keep, SPLIT=splits > 1,
            BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_K=tile.depth,
            PRECISION=tiles.precision(x), **tiles.options(tile),
        )  # fmt: skip
        if splits > 1:
            last = tiles.adding(splits)
            launches.launch(
                gate_parts_kernel, (tiles.cdiv(tokens, last.rows), tiles.cdiv(columns, last.columns)),
                parts, z, z.stride(0), hidden, gated, tokens, columns, rank, group,
                SPLITS=splits, KEEP=keep, BLOCK_N=last.rows, BLOCK_C=last.columns, **tiles.options(last),
            )  # fmt: skip

    with tiles.on_device(x):
        tiles.launched("shrink", tile, launch)
    return hidden, gated
