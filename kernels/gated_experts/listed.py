"""Triton kernels that pass over gates of 0: which experts a tile of rows is left with, and z ⊙ H of these."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mingle.kernels import launches, tiles
from mingle.kernels.gated_experts.active import Active, sorting_pays
from mingle.kernels.gated_experts.common import add_product, ordered


@triton.jit(do_not_specialize=["N", "group"])
def list_kernel(
    z_ptr, stride_zg,  # [G, T] fp32
    order_ptr,  # int32 [G]; read where HAS_ORDER
    listed_ptr,  # int32 [row tiles, T + 1]
    N, T, group,
    HAS_ORDER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
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
            if HAS_ORDER:
                groups = tl.load(order_ptr + groups, mask=groups < end_group, other=0)
            z = tl.load(
                z_ptr + groups.to(tl.int64)[:, None] * stride_zg + experts[None, :], mask=ok, other=0.0
            )
            used = tl.maximum(used, tl.max((z != 0).to(tl.int32), 0))
        places = count + tl.cumsum(used, 0) - used
        tl.store(listed_ptr + row_tile * (T + 1) + places, experts, mask=used > 0)
        count += tl.sum(used, 0)
    tl.store(listed_ptr + row_tile * (T + 1) + T, count)


@triton.jit(do_not_specialize=["N", "group", "programs"])
def shrink_listed_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    a_ptr, stride_at, stride_ar, stride_ak,  # [T, r, K]
    z_ptr, stride_zg,  # [G, T] fp32
    listed_ptr, order_ptr,  # int32, of `Active`
    gated_ptr,  # [N, T·r], by position
    N, K, T, r, group, programs,
    HAS_ORDER: tl.constexpr, LISTED_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z ⊙ (x A_iᵀ) for the listed experts of a row tile, which `programs` programs share, and no others."""
    row_tile, first = tl.program_id(0) // programs, tl.program_id(0) % programs
    positions = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (positions < N)[:, None]
    rows = ordered(positions, order_ptr, N, group, HAS_ORDER)
    long_rows, long_positions = rows.to(tl.int64)[:, None], positions.to(tl.int64)[:, None]
    experts_ptr = listed_ptr + row_tile * BLOCK_N // LISTED_ROWS * (T + 1)
    z_rows = z_ptr + (rows // group).to(tl.int64) * stride_zg
    chunks = tl.cdiv(r, BLOCK_R)
    for step in range(first, tl.load(experts_ptr + T) * chunks, programs):
        expert = tl.load(experts_ptr + step // chunks)
        j = (step % chunks) * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = add_product(
            tl.zeros([BLOCK_N, BLOCK_R], tl.float32), x_ptr + long_rows * stride_xn, stride_xk,
            a_ptr + expert.to(tl.int64) * stride_at + j[None, :] * stride_ar, stride_ak,
            row_ok, (j < r)[None, :], 0, K, BLOCK_K, PRECISION,
        )  # fmt: skip
        z = tl.load(z_rows + expert, mask=positions < N, other=0.0)[:, None]
        place = long_positions * (T * r) + (expert * r + j)[None, :]
        tl.store(gated_ptr + place, (acc * z).to(gated_ptr.dtype.element_ty), mask=row_ok & (j < r)[None, :])


@triton.jit(do_not_specialize=["G"])
def key_kernel(
    z_ptr, stride_zg,  # [G, T] fp32
    key_ptr,  # int64 [G]
    G, T,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What groups are sorted by: the first two experts whose gates are not 0, T where there is none."""
    groups = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    one = tl.zeros([BLOCK_G], tl.int32) + T
    two = one
    for first in range(0, T, BLOCK_E):
        experts = (first + tl.arange(0, BLOCK_E))[None, :]
        ok = (groups < G)[:, None] & (experts < T)
        z = tl.load(z_ptr + groups.to(tl.int64)[:, None] * stride_zg + experts, mask=ok, other=0.0)
        least = tl.min(tl.where(z != 0, experts, T), 1)
        next_one = tl.min(tl.where((z != 0) & (experts != least[:, None]), experts, T), 1)
        two = tl.minimum(two, tl.where(one < T, least, next_one))
        one = tl.minimum(one, least)
    tl.store(key_ptr + groups, one.to(tl.int64) * (T + 1) + two, mask=groups < G)


def active(
    x: torch.Tensor, columns: int, outputs: int, z: torch.Tensor, group: int, *, sort: bool = True
) -> Active:
    """Which experts tiles of rows of x are left with, listed once for all launches that pass over the others.

    Nothing is read on the host.

    Args:
        x: [N, K], N > 0; its sizes and dtype count.
        columns: T·r.
        outputs: d_out.
        z: gate values [G, T] fp32, contiguous columns.
        group: tokens per gate row.
        sort: whether tokens may be taken in another order, where that pays.
    """
    (tokens, width), experts = x.shape, z.shape[1]
    rows = tiles.listed_rows(x, tokens)
    products = columns // experts * (width + outputs)
    sizes = tokens, group, experts, rows, products, x.element_size(), tiles.chip(x.device)
    order = None
    if sort and sorting_pays(*sizes):
        order = torch.argsort(_keys(z), stable=True).to(torch.int32)
    return Active(_listed(z, order, group, tokens, rows), order, rows)


@launches.repeated
def _keys(z: torch.Tensor) -> torch.Tensor:
    groups, experts = z.shape
    keys = z.new_empty(groups, dtype=torch.int64)
    tile = tiles.Tile(16, min(128, tiles.next_power_of_2(experts)), 0, warps=4, stages=2)
    with tiles.on_device(z):
        launches.launch(
            key_kernel, (tiles.cdiv(groups, tile.rows),),
            z, z.stride(0), keys, groups, experts,
            BLOCK_G=tile.rows, BLOCK_E=tile.columns, **tiles.options(tile),
        )  # fmt: skip
    return keys


@launches.repeated
def _listed(z: torch.Tensor, order: torch.Tensor | None, group: int, tokens: int, rows: int) -> torch.Tensor:
    row_tiles, experts = tiles.cdiv(tokens, rows), z.shape[1]
    found = z.new_empty(row_tiles, experts + 1, dtype=torch.int32)
    tile = tiles.Tile(16, min(128, tiles.next_power_of_2(experts)), 0, warps=4, stages=2)
    with tiles.on_device(z):
        launches.launch(
            list_kernel, (row_tiles,),
            z, z.stride(0), order, found, tokens, experts, group,
            HAS_ORDER=order is not None,
            BLOCK_N=rows, BLOCK_G=tile.rows, BLOCK_E=tile.columns, **tiles.options(tile),
        )  # fmt: skip
    return found


def shrink_listed(
    x: torch.Tensor, A: torch.Tensor, z: torch.Tensor, group: int, active: Active
) -> torch.Tensor:
    """z ⊙ (x A_catᵀ) [N, T·r] in x's dtype, by position; what belongs to no listed expert is not written."""
    return _shrink_listed(x, A, z, group, *active)


@launches.repeated
def _shrink_listed(
    x: torch.Tensor,
    A: torch.Tensor,
    z: torch.Tensor,
    group: int,
    listed: torch.Tensor,
    order: torch.Tensor | None,
    listed_rows: int,
) -> torch.Tensor:
    x, A = tiles.addressable(x, 1), tiles.addressable(A, 1, 2)
    (tokens, width), (experts, rank) = x.shape, A.shape[:2]
    gated = x.new_empty(tokens, experts * rank)
    strain = tiles.strain((x, A), (width,), special=rank % 16 > 0)
    tile = tiles.listed("shrink", x, listed_rows, rank, strain)
    row_tiles = tiles.cdiv(tokens, tile.rows)
    programs = max(1, min(2 * tiles.chip(x.device).multiprocessors // row_tiles, experts))

    def launch(tile: tiles.Tile) -> None:
        launches.launch(
            shrink_listed_kernel, (row_tiles * programs,),
            x, *x.stride(), A, *A.stride(), z, z.stride(0), listed, order, gated,
            tokens, width, experts, rank, group, programs,
            HAS_ORDER=order is not None, LISTED_ROWS=listed_rows,
            BLOCK_N=tile.rows, BLOCK_R=tile.columns, BLOCK_K=tile.depth,
            PRECISION=tiles.precision(x), **tiles.options(tile),
        )  # fmt: skip

    with tiles.on_device(x):
        tiles.launched("listed shrink", tile, launch, rows=False)
    return gated
