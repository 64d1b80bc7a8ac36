"""Triton kernels that pass over gates of 0: which experts a tile of rows is left with, and z ⊙ H of these."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mingle.kernels import launches, tiles
from mingle.kernels.gated_experts.common import add_product


@triton.jit(do_not_specialize=["N", "group"])
def list_kernel(
    z_ptr, stride_zg,  # [G, T] fp32
    experts_ptr,  # int32 [row tiles, T]
    count_ptr,  # int32 [row tiles]
    N, T, group,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The experts with a gate that is not 0 for some row of a tile, in rising order, and their number."""
    row_tile = tl.program_id(0)
    first_group = row_tile * BLOCK_N // group
    end_group = (min((row_tile + 1) * BLOCK_N, N) - 1) // group + 1
    count = 0
    for first in range(0, T, BLOCK_E):
        experts = first + tl.arange(0, BLOCK_E)
        used = tl.zeros([BLOCK_E], tl.int32)
        for g0 in range(first_group, end_group, BLOCK_G):
            groups = g0 + tl.arange(0, BLOCK_G)
            ok = (groups < end_group)[:, None] & (experts < T)[None, :]
            z = tl.load(
                z_ptr + groups.to(tl.int64)[:, None] * stride_zg + experts[None, :], mask=ok, other=0.0
            )
            used = tl.maximum(used, tl.max((z != 0).to(tl.int32), 0))
        places = count + tl.cumsum(used, 0) - used
        tl.store(experts_ptr + row_tile * T + places, experts, mask=used > 0)
        count += tl.sum(used, 0)
    tl.store(count_ptr + row_tile, count)


@triton.jit(do_not_specialize=["N", "group", "programs"])
def shrink_listed_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    a_ptr, stride_at, stride_ar, stride_ak,  # [T, r, K]
    z_ptr, stride_zg,  # [G, T] fp32
    experts_ptr, count_ptr,  # int32, what `listed` returns
    gated_ptr,  # [N, T·r]
    N, K, T, r, group, programs,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z ⊙ (x A_iᵀ) for the listed experts of a row tile, which `programs` programs share, and no others."""
    row_tile, first = tl.program_id(0) // programs, tl.program_id(0) % programs
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (rows < N)[:, None]
    long_rows = rows.to(tl.int64)[:, None]
    z_rows = z_ptr + (rows // group).to(tl.int64) * stride_zg
    chunks = tl.cdiv(r, BLOCK_R)
    for step in range(first, tl.load(count_ptr + row_tile) * chunks, programs):
        expert = tl.load(experts_ptr + row_tile * T + step // chunks)
        j = (step % chunks) * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = add_product(
            tl.zeros([BLOCK_N, BLOCK_R], tl.float32), x_ptr + long_rows * stride_xn, stride_xk,
            a_ptr + expert.to(tl.int64) * stride_at + j[None, :] * stride_ar, stride_ak,
            row_ok, (j < r)[None, :], 0, K, BLOCK_K, PRECISION,
        )  # fmt: skip
        z = tl.load(z_rows + expert, mask=rows < N, other=0.0)[:, None]
        place = long_rows * (T * r) + (expert * r + j)[None, :]
        tl.store(gated_ptr + place, (acc * z).to(gated_ptr.dtype.element_ty), mask=row_ok & (j < r)[None, :])


def listed(z: torch.Tensor, group: int, tokens: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts whose gates are not all 0 for a tile of `rows` rows: int32 [tiles, T], and their number.

    Nothing is read on the host.
    """
    tiles_of_rows, experts = tiles.cdiv(tokens, rows), z.shape[1]
    found = z.new_empty(tiles_of_rows, experts, dtype=torch.int32)
    count = z.new_empty(tiles_of_rows, dtype=torch.int32)
    tile = tiles.Tile(16, min(128, tiles.next_power_of_2(experts)), 0, warps=4, stages=2)
    launches.launch(
        list_kernel, (tiles_of_rows,),
        z, z.stride(0), found, count, tokens, experts, group,
        BLOCK_N=rows, BLOCK_G=tile.rows, BLOCK_E=tile.columns, **tiles.options(tile),
    )  # fmt: skip
    return found, count


def shrink_listed(x: torch.Tensor, A: torch.Tensor, z: torch.Tensor, group: int) -> torch.Tensor:
    (tokens, width), (experts, rank) = x.shape, A.shape[:2]
    gated = x.new_empty(tokens, experts * rank)
    strain = tiles.strain((x, A), (width,), special=rank % 16 > 0)
    tile = tiles.listed("shrink", x, tokens, rank, strain)
    row_tiles = tiles.cdiv(tokens, tile.rows)
    programs = max(1, min(2 * tiles.chip(x.device).multiprocessors // row_tiles, experts))

    def launch(tile: tiles.Tile) -> None:
        launches.launch(
            shrink_listed_kernel, (row_tiles * programs,),
            x, *x.stride(), A, *A.stride(), z, z.stride(0), *listed(z, group, tokens, tile.rows), gated,
            tokens, width, experts, rank, group, programs,
            BLOCK_N=tile.rows, BLOCK_R=tile.columns, BLOCK_K=tile.depth,
            PRECISION=tiles.precision(x), **tiles.options(tile),
        )  # fmt: skip

    with tiles.on_device(x):
        tiles.launched("listed shrink", tile, launch, rows=False)
    return gated
