"""Triton kernels of the gated sum of low-rank experts, and their launchers.

    gates     z = x̄ wᵀ + β [G, T] and what the gates saw, x̄ [G, d_in]
    shrink    H = x A_catᵀ [N, T·r] and z ⊙ H
    expand    y = x W₀ᵀ + b + (z ⊙ H) B_cat, in one accumulator; with swapped roles also the gradient of x
    upstream  z ⊙ u with u = dy B_catᵀ, and the row sums of u ⊙ H per expert: the backward of the gates

Tokens are numbered n = 0 … N − 1 and share a gate by `group`: token n has the gate values z[n // group], so
that a group is one token, one sample or the whole batch.  All sums run in fp32, none through atomics: equal
inputs give equal bits.  Where there are too few tiles for the chip, programs share the inner products of a
tile, and a second launch adds up their parts in a fixed order.  Large products of half precision take the
kernels of `mingle.kernels.gated_experts.descriptors`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mingle.kernels import launches, tiles
from mingle.kernels.gated_experts import descriptors
from mingle.kernels.gated_experts.common import finish, placed
from mingle.kernels.gated_experts.gates import gates

__all__ = ["expand", "gates", "shrink", "upstream"]


@triton.jit
def _add_product(
    acc, left, stride_lk, right, stride_rk, row_ok, column_ok, first, last,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + left rightᵀ over k = first … last − 1.

    left and right: pointers to rows [BLOCK_N, 1] and to columns [1, BLOCK_C].
    """
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(left + k[None, :] * stride_lk, mask=row_ok & (k < last)[None, :], other=0.0)
        b = tl.load(
            right + k.to(tl.int64)[:, None] * stride_rk, mask=column_ok & (k < last)[:, None], other=0.0
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_C]
    return acc


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
    acc = _add_product(
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


@triton.jit(do_not_specialize=["N", "group"])
def expand_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    w_ptr, stride_wo, stride_wk,  # [O, K]
    bias_ptr,  # [O]
    h_ptr, stride_hn,  # z ⊙ H [N, T·r], columns contiguous
    up_ptr, stride_ut, stride_ur, stride_uo,  # [T, r, O]
    experts_ptr, count_ptr,  # int32, what `listed` returns; read where SKIP
    share_ptr,  # [G, T] fp32: the gate gradient's share of one token
    gate_ptr, stride_gt, stride_go,  # [T, O] gate weights
    mask_ptr,  # [N] bool
    y_ptr,  # [N, O]; fp32 [splits, N, O] where SPLIT
    N, K, O, T, r, group, part,
    HAS_BIAS: tl.constexpr, HAS_SHARE: tl.constexpr, HAS_MASK: tl.constexpr,
    SKIP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + b + (z ⊙ H) up [+ share · gate], everything in one accumulator.

    With SPLIT, over `part` of the K + T·r columns of x and z ⊙ H.
    """
    split, row_tile, column_tile = placed(N, O, BLOCK_N, BLOCK_O)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    row_ok, column_ok = (rows < N)[:, None], (columns < O)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    R = T * r
    first, last = 0, K
    if SPLIT:
        first, last = min(split * part, K), min((split + 1) * part, K)
    acc = _add_product(
        tl.zeros([BLOCK_N, BLOCK_O], tl.float32), x_ptr + long_rows * stride_xn, stride_xk,
        w_ptr + columns.to(tl.int64)[None, :] * stride_wo, stride_wk,
        row_ok, column_ok, first, last, BLOCK_K, PRECISION,
    )  # fmt: skip

    h_rows = h_ptr + long_rows * stride_hn
    up_columns = up_ptr + columns[None, :] * stride_uo
    if SKIP:
        for step in range(tl.load(count_ptr + row_tile) * CHUNKS):
            expert = tl.load(experts_ptr + row_tile * T + step // CHUNKS)
            j = (step % CHUNKS) * BLOCK_R + tl.arange(0, BLOCK_R)
            h = tl.load(h_rows + (expert * r + j)[None, :], mask=row_ok & (j < r)[None, :], other=0.0)
            up = tl.load(
                up_columns + expert.to(tl.int64) * stride_ut + j[:, None] * stride_ur,
                mask=column_ok & (j < r)[:, None],
                other=0.0,
            )
            acc = tl.dot(h, up, acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_R] @ [BLOCK_R, BLOCK_O]
    else:
        first, last = 0, R
        if SPLIT:
            first, last = max(split * part - K, 0), min((split + 1) * part - K, R)
        for j0 in range(first, last, BLOCK_R):
            j = j0 + tl.arange(0, BLOCK_R)
            inside = j < last
            h = tl.load(h_rows + j[None, :], mask=row_ok & inside[None, :], other=0.0)
            up_rows = ((j // r).to(tl.int64) * stride_ut + (j % r) * stride_ur)[:, None]
            up = tl.load(up_columns + up_rows, mask=column_ok & inside[:, None], other=0.0)
            acc = tl.dot(h, up, acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_R] @ [BLOCK_R, BLOCK_O]

    if SPLIT:
        tl.store(
            y_ptr + tl.cast(split, tl.int64) * N * O + long_rows * O + columns[None, :],
            acc,
            mask=row_ok & column_ok,
        )
    else:
        acc = finish(
            acc, rows, columns, bias_ptr, share_ptr, gate_ptr, stride_gt, stride_go, mask_ptr, N, O, T, group,
            HAS_BIAS, HAS_SHARE, HAS_MASK, PRECISION,
        )  # fmt: skip
        tl.store(
            y_ptr + long_rows * O + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=row_ok & column_ok
        )


@triton.jit(do_not_specialize=["N", "group"])
def add_parts_kernel(
    parts_ptr,  # [splits, N, O] fp32
    bias_ptr, share_ptr, gate_ptr, stride_gt, stride_go, mask_ptr,
    y_ptr,  # [N, O]
    N, O, T, group,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHARE: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y from its parts."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    ok = (rows < N)[:, None] & (columns < O)[None, :]
    place = rows.to(tl.int64)[:, None] * O + columns[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for split in tl.static_range(SPLITS):  # all are asked for at once
        acc += tl.load(parts_ptr + tl.cast(split, tl.int64) * N * O + place, mask=ok, other=0.0)
    acc = finish(
        acc, rows, columns, bias_ptr, share_ptr, gate_ptr, stride_gt, stride_go, mask_ptr, N, O, T, group,
        HAS_BIAS, HAS_SHARE, HAS_MASK, PRECISION,
    )  # fmt: skip
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["N", "group"])
def upstream_kernel(
    dy_ptr, stride_dn, stride_do,  # [N, O]
    b_ptr, stride_bt, stride_bo, stride_br,  # [T, O, r]
    h_ptr, stride_hn,  # [N, T·r], columns contiguous
    z_ptr, stride_zg,  # [G, T] fp32
    u_ptr,  # [N, T·r], written where KEEP
    dz_ptr,  # [N, T] fp32
    N, O, T, r, group,
    KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z ⊙ u with u = dy B_i of one expert and, before u is rounded, the sums over its columns of u ⊙ H."""
    expert = tl.program_id(0) % T
    rows = (tl.program_id(0) // T) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (rows < N)[:, None]
    long_rows = rows.to(tl.int64)
    z_rows = z_ptr + (rows // group).to(tl.int64) * stride_zg + expert
    dz = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, r, BLOCK_R):
        j = first + tl.arange(0, BLOCK_R)
        acc = _add_product(
            tl.zeros([BLOCK_N, BLOCK_R], tl.float32), dy_ptr + long_rows[:, None] * stride_dn, stride_do,
            b_ptr + expert.to(tl.int64) * stride_bt + j[None, :] * stride_br, stride_bo,
            row_ok, (j < r)[None, :], 0, O, BLOCK_K, PRECISION,
        )  # fmt: skip
        ok = row_ok & (j < r)[None, :]
        h = tl.load(h_ptr + long_rows[:, None] * stride_hn + (expert * r + j)[None, :], mask=ok, other=0.0)
        dz += tl.sum(acc * h.to(tl.float32), 1)
        if KEEP:
            z = tl.load(z_rows, mask=rows < N, other=0.0)[:, None]
            tl.store(
                u_ptr + long_rows[:, None] * (T * r) + (expert * r + j)[None, :],
                (acc * z).to(u_ptr.dtype.element_ty),
                mask=ok,
            )
    tl.store(dz_ptr + long_rows * T + expert, dz, mask=rows < N)


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
        acc = _add_product(
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


def _shrink_listed(x: torch.Tensor, A: torch.Tensor, z: torch.Tensor, group: int) -> torch.Tensor:
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


@launches.repeated
def shrink(
    x: torch.Tensor, A: torch.Tensor, z: torch.Tensor, group: int, skip: bool, *, keep: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """H = x A_catᵀ and z ⊙ H.

    Args:
        x: [N, K], N > 0, any strides.
        A: [T, r, K], T > 0, any strides.
        z: gate values [G, T] fp32, contiguous columns.
        group: tokens per gate row.
        skip: leave out experts whose gates are 0 for a whole tile of rows, which `expand` does not read; H is
            not kept.
        keep: H is needed afterwards.

    Returns:
        H (no rows without `keep`) and z ⊙ H, both [N, T·r] in x's dtype.
    """
    x, A = tiles.addressable(x, 1), tiles.addressable(A, 1, 2)
    (tokens, width), (experts, rank) = x.shape, A.shape[:2]
    columns = experts * rank
    if skip:
        return x.new_empty(0, columns), _shrink_listed(x, A, z, group)
    hidden, gated = x.new_empty(tokens if keep else 0, columns), x.new_empty(tokens, columns)
    flat = descriptors.flat(x, A)
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
            last = tiles.ADDING
            launches.launch(
                gate_parts_kernel, (tiles.cdiv(tokens, last.rows), tiles.cdiv(columns, last.columns)),
                parts, z, z.stride(0), hidden, gated, tokens, columns, rank, group,
                SPLITS=splits, KEEP=keep, BLOCK_N=last.rows, BLOCK_C=last.columns, **tiles.options(last),
            )  # fmt: skip

    with tiles.on_device(x):
        tiles.launched("shrink", tile, launch)
    return hidden, gated


def expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    gated: torch.Tensor,
    up: torch.Tensor,
    z: torch.Tensor,
    group: int,
    skip: bool,
    *,
    keep: bool = True,
    share: torch.Tensor | None = None,
    gate_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x Wᵀ + b + (z ⊙ H) up, plus share · gate_weight where given.

    That is the forward, and with swapped roles the gradient of x.

    Args:
        x: [N, K], N > 0, any strides.
        weight: [O, K], any strides.
        bias: [O], contiguous, or None.
        hidden, keep: not used by these kernels.
        gated: z ⊙ H [N, T·r], contiguous columns.
        up: [T, r, O], any strides.
        z: [G, T] fp32, contiguous columns.
        group: tokens per gate row.
        skip: pass over experts whose gates are 0 for a whole tile of rows.
        share: [G, T] fp32, contiguous; reaches the tokens that `mask` [N], contiguous, lets through.
        gate_weight: [T, O], any strides; needed with `share`.

    Returns:
        y [N, O] in x's dtype.
    """
    if gate_weight is not None:
        gate_weight = gate_weight.to(x.dtype)  # y is rounded to it anyway
    return _expand(x, weight, bias, gated, up, z, group, skip, share, gate_weight, mask)


@launches.repeated
def _expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gated: torch.Tensor,
    up: torch.Tensor,
    z: torch.Tensor,
    group: int,
    skip: bool,
    share: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    x, up = tiles.addressable(x, 1), tiles.addressable(up, 1, 2)
    (tokens, width), (outputs, _), (experts, rank, _) = x.shape, weight.shape, up.shape
    y = x.new_empty(tokens, outputs)
    gate = weight if gate_weight is None else tiles.addressable(gate_weight, 0, 1)
    columns = experts * rank
    flat = None if skip else descriptors.flat(x, up, weight, gated)
    strain = tiles.strain((x, weight, up), (width, outputs), special=rank % 16 > 0)
    if skip:
        tile = tiles.listed("expand", x, tokens, outputs, strain)
    else:
        tile = tiles.choose(
            "expand", x, tokens, outputs, width + columns, strain, splits=True, described=flat is not None
        )
    rest = (bias, share, gate, *gate.stride(), mask)
    has = dict(HAS_BIAS=bias is not None, HAS_SHARE=share is not None, HAS_MASK=mask is not None)

    def launch(tile: tiles.Tile) -> None:
        if tile.described and flat is not None:
            descriptors.expand(x, weight, gated, flat, rest, y, experts, group, has, tile)
            return
        splits, part = tiles.shares(width + columns, tile)
        active = listed(z, group, tokens, tile.rows) if skip else (None, None)
        parts = y if splits == 1 else x.new_empty(splits, tokens, outputs, dtype=torch.float32)
        block_rank = tiles.rank_block(rank, tile.depth) if skip else tile.depth
        grid = splits * tiles.cdiv(tokens, tile.rows) * tiles.cdiv(outputs, tile.columns)
        launches.launch(
            expand_kernel, (grid,),
            x, *x.stride(), weight, *weight.stride(), bias, gated, gated.stride(0), up, *up.stride(),
            *active, *rest[1:], parts, tokens, width, outputs, experts, rank, group, part,
            **has, SKIP=skip, SPLIT=splits > 1,
            BLOCK_N=tile.rows, BLOCK_O=tile.columns, BLOCK_K=tile.depth, BLOCK_R=block_rank,
            CHUNKS=tiles.cdiv(rank, block_rank), PRECISION=tiles.precision(x), **tiles.options(tile),
        )  # fmt: skip
        if splits > 1:
            last = tiles.ADDING
            launches.launch(
                add_parts_kernel, (tiles.cdiv(tokens, last.rows), tiles.cdiv(outputs, last.columns)),
                parts, *rest, y, tokens, outputs, experts, group,
                SPLITS=splits, **has, BLOCK_N=last.rows, BLOCK_O=last.columns,
                PRECISION=tiles.precision(x), **tiles.options(last),
            )  # fmt: skip

    with tiles.on_device(x):
        tiles.launched("expand", tile, launch, rows=not skip)
    return y


@launches.repeated
def upstream(
    dy: torch.Tensor,
    B: torch.Tensor,
    hidden: torch.Tensor,
    z: torch.Tensor,
    group: int,
    skip: bool,
    *,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z ⊙ u with u = dy B_catᵀ, and the sums of u ⊙ H over each expert's columns.

    Args:
        dy: [N, O], N > 0, any strides.
        B: [T, O, r], T > 0, any strides.
        hidden: H [N, T·r], contiguous columns; not read with `skip`.
        z: [G, T] fp32, contiguous columns.
        group: tokens per gate row.
        skip: leave out experts whose gates are 0 for a whole tile of rows, and the sums.
        keep: z ⊙ u is needed, not the sums alone.

    Returns:
        z ⊙ u [N, T·r] in dy's dtype (no rows without `keep`), and the sums dz [N, T] fp32 (no rows with
        `skip`).
    """
    dy, B = tiles.addressable(dy, 1), tiles.addressable(B, 1, 2)
    (tokens, outputs), (experts, _, rank) = dy.shape, B.shape
    columns = experts * rank
    if skip:
        return _shrink_listed(dy, B.mT, z, group), dy.new_empty(0, experts, dtype=torch.float32)
    u = dy.new_empty(tokens if keep else 0, columns)
    dz = dy.new_empty(tokens, experts, dtype=torch.float32)
    strain = tiles.strain((dy, B), (outputs,), special=rank % 16 > 0)
    flat = descriptors.flat(dy, B.mT, hidden) if keep else None
    tile = tiles.choose("upstream", dy, tokens, columns, outputs, strain, described=flat is not None)

    def launch(tile: tiles.Tile) -> None:
        if tile.described and flat is not None and descriptors.whole_experts(rank, tile):
            descriptors.shrink(dy, flat, z, group, None, u, hidden, dz, rank, tile)
            return
        tile = tile._replace(columns=min(tile.columns, 128))
        launches.launch(
            upstream_kernel, (tiles.cdiv(tokens, tile.rows) * experts,),
            dy, *dy.stride(), B, *B.stride(), hidden, hidden.stride(0), z, z.stride(0), u, dz,
            tokens, outputs, experts, rank, group,
            KEEP=keep,
            BLOCK_N=tile.rows, BLOCK_R=tiles.rank_block(rank, tile.columns), BLOCK_K=tile.depth,
            PRECISION=tiles.precision(dy), **tiles.options(tile),
        )  # fmt: skip

    with tiles.on_device(dy):
        tiles.launched("upstream", tile, launch)
    return u, dz
