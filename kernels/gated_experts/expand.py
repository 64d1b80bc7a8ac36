"""Triton kernels for y = x W₀ᵀ + b + (z ⊙ H) B_cat in one accumulator, and their launcher.

With swapped roles they give the gradient of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mingle.kernels import launches, tiles
from mingle.kernels.gated_experts import descriptors
from mingle.kernels.gated_experts.active import Active
from mingle.kernels.gated_experts.common import add_product, finish, ordered, placed


@triton.jit(do_not_specialize=["N", "group"])
def expand_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    w_ptr, stride_wo, stride_wk,  # [O, K]
    bias_ptr,  # [O]
    h_ptr, stride_hn,  # z ⊙ H [N, T·r], columns contiguous
    up_ptr, stride_ut, stride_ur, stride_uo,  # [T, r, O]
    listed_ptr, order_ptr,  # int32, of `Active`; read where SKIP and HAS_ORDER
    share_ptr,  # [G, T] fp32: the gate gradient's share of one token
    gate_ptr, stride_gt, stride_go,  # [T, O] gate weights
    mask_ptr,  # [N] bool
    y_ptr,  # [N, O]; fp32 [splits, N, O] where SPLIT
    N, K, O, T, r, group, part,
    HAS_BIAS: tl.constexpr, HAS_SHARE: tl.constexpr, HAS_MASK: tl.constexpr,
    SKIP: tl.constexpr, HAS_ORDER: tl.constexpr, LISTED_ROWS: tl.constexpr,
    SPLIT: tl.constexpr, JOINED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + b + (z ⊙ H) up [+ share · gate], everything in one accumulator.

    With SPLIT, over `part` of the K + T·r columns of x and z ⊙ H.  JOINED: all rows of `up`, of whatever
    expert, are equally far apart.
    """
    split, row_tile, column_tile = placed(N, O, BLOCK_N, BLOCK_O)
    positions = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    row_ok, column_ok = (positions < N)[:, None], (columns < O)[None, :]
    rows = ordered(positions, order_ptr, N, group, HAS_ORDER)
    long_rows = rows.to(tl.int64)[:, None]
    R = T * r
    first, last = 0, K
    if SPLIT:
        first, last = min(split * part, K), min((split + 1) * part, K)
    acc = add_product(
        tl.zeros([BLOCK_N, BLOCK_O], tl.float32), x_ptr + long_rows * stride_xn, stride_xk,
        w_ptr + columns.to(tl.int64)[None, :] * stride_wo, stride_wk,
        row_ok, column_ok, first, last, BLOCK_K, PRECISION,
    )  # fmt: skip

    h_rows = h_ptr + positions.to(tl.int64)[:, None] * stride_hn
    up_columns = up_ptr + columns[None, :] * stride_uo
    if SKIP:
        experts_ptr = listed_ptr + row_tile * BLOCK_N // LISTED_ROWS * (T + 1)
        for step in range(tl.load(experts_ptr + T) * CHUNKS):
            expert = tl.load(experts_ptr + step // CHUNKS)
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
        # with JOINED no step divides or multiplies row by row, which would cost as much as all its other work
        joined_rows = up_columns + (first + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None] * stride_ur
        for j0 in range(first, last, BLOCK_R):
            j = j0 + tl.arange(0, BLOCK_R)
            inside = j < last
            h = tl.load(h_rows + j[None, :], mask=row_ok & inside[None, :], other=0.0)
            if JOINED:
                up_rows = joined_rows
                joined_rows += tl.cast(stride_ur, tl.int64) * BLOCK_R
            else:
                up_rows = up_columns + ((j // r).to(tl.int64) * stride_ut + (j % r) * stride_ur)[:, None]
            up = tl.load(up_rows, mask=column_ok & inside[:, None], other=0.0)
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


def expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    gated: torch.Tensor,
    up: torch.Tensor,
    z: torch.Tensor,
    group: int,
    active: Active | None,
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
        active: the experts to compute, where those are passed over whose gates are 0 for a whole tile of
            rows; the rows of `gated` are positions then (see `mingle.kernels.gated_experts.active`).
        share: [G, T] fp32, contiguous; reaches the tokens that `mask` [N], contiguous, lets through.
        gate_weight: [T, O], any strides; needed with `share`.

    Returns:
        y [N, O] in x's dtype.
    """
    if gate_weight is not None:
        gate_weight = gate_weight.to(x.dtype)  # y is rounded to it anyway
    found = (None, None, 0) if active is None else active
    return _expand(x, weight, bias, gated, up, group, share, gate_weight, mask, *found)


@launches.repeated
def _expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gated: torch.Tensor,
    up: torch.Tensor,
    group: int,
    share: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    mask: torch.Tensor | None,
    listed: torch.Tensor | None,
    order: torch.Tensor | None,
    listed_rows: int,
) -> torch.Tensor:
    x, up = tiles.addressable(x, 1), tiles.addressable(up, 1, 2)
    (tokens, width), (outputs, _), (experts, rank, _) = x.shape, weight.shape, up.shape
    y = x.new_empty(tokens, outputs)
    gate = weight if gate_weight is None else tiles.addressable(gate_weight, 0, 1)
    columns = experts * rank
    skip = listed is not None
    flat = None if skip else descriptors.flat(x, up, weight, gated)
    strain = tiles.strain((x, weight, up), (width, outputs), special=rank % 16 > 0)
    if skip:
        tile = tiles.listed("expand", x, listed_rows, outputs, strain)
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
        parts = y if splits == 1 else x.new_empty(splits, tokens, outputs, dtype=torch.float32)
        block_rank = tiles.rank_block(rank, tile.depth) if skip else tile.depth
        grid = splits * tiles.cdiv(tokens, tile.rows) * tiles.cdiv(outputs, tile.columns)
        launches.launch(
            expand_kernel, (grid,),
            x, *x.stride(), weight, *weight.stride(), bias, gated, gated.stride(0), up, *up.stride(),
            listed, order, *rest[1:], parts, tokens, width, outputs, experts, rank, group, part,
            **has, SKIP=skip, HAS_ORDER=order is not None, LISTED_ROWS=listed_rows,
            SPLIT=splits > 1, JOINED=up.stride(0) == rank * up.stride(1),
            BLOCK_N=tile.rows, BLOCK_O=tile.columns, BLOCK_K=tile.depth, BLOCK_R=block_rank,
            CHUNKS=tiles.cdiv(rank, block_rank), PRECISION=tiles.precision(x), **tiles.options(tile),
        )  # fmt: skip
        if splits > 1:
            last = tiles.adding(splits)
            launches.launch(
                add_parts_kernel, (tiles.cdiv(tokens, last.rows), tiles.cdiv(outputs, last.columns)),
                parts, *rest, y, tokens, outputs, experts, group,
                SPLITS=splits, **has, BLOCK_N=last.rows, BLOCK_O=last.columns,
                PRECISION=tiles.precision(x), **tiles.options(last),
            )  # fmt: skip

    with tiles.on_device(x):
        tiles.launched("expand", tile, launch, rows=not skip)
    return y
