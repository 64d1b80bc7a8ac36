"""What the Triton kernels of the gated sum of experts share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swizzled(pid, row_tiles, column_tiles, BAND: tl.constexpr):
    """Tile (row, column) of program `pid`.

    Programs that run together work on bands of BAND row tiles, and so share operands in L2.
    """
    per_band = BAND * column_tiles
    first = (pid // per_band) * BAND
    rows = min(row_tiles - first, BAND)
    return first + (pid % per_band) % rows, (pid % per_band) // rows


@triton.jit
def placed(N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's part of the inner products, and its tile (row, column) of an output [N, C]."""
    row_tiles, column_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    row_tile, column_tile = swizzled(tile, row_tiles, column_tiles, 8)
    return tl.program_id(0) // (row_tiles * column_tiles), row_tile, column_tile


@triton.jit
def ordered(positions, order_ptr, N, group, HAS_ORDER: tl.constexpr):
    """The tokens at these positions (see `mingle.kernels.gated_experts.active`), any beyond the last."""
    if HAS_ORDER:
        groups = tl.load(order_ptr + positions // group, mask=positions < N, other=0)
        return groups * group + positions % group
    else:  # noqa: RET505 - Triton compiles one of the two
        return positions


@triton.jit
def finish(
    acc, rows, columns,
    bias_ptr,  # [O]
    share_ptr,  # [G, T] fp32
    gate_ptr, stride_gt, stride_go,  # [T, O]
    mask_ptr,  # [N] bool
    N, O, T, group,
    HAS_BIAS: tl.constexpr, HAS_SHARE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [+ share · gate of the tokens that count] [+ bias]."""
    if HAS_SHARE:
        counted = (rows < N)[:, None]
        if HAS_MASK:
            counted = counted & (tl.load(mask_ptr + rows, mask=rows < N, other=0) != 0)[:, None]
        groups = (rows // group).to(tl.int64)
        for first in range(0, T, 16):
            experts = first + tl.arange(0, 16)
            share = tl.load(
                share_ptr + groups[:, None] * T + experts[None, :],
                mask=counted & (experts < T)[None, :],
                other=0.0,
            )
            gate = tl.load(
                gate_ptr + experts[:, None] * stride_gt + columns[None, :] * stride_go,
                mask=(experts < T)[:, None] & (columns < O)[None, :],
                other=0.0,
            )
            # [rows, 16] @ [16, columns]
            acc = tl.dot(share.to(gate.dtype), gate, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < O, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def add_product(
    acc, left, stride_lk, right, stride_rk, row_ok, column_ok, first, last,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + left rightᵀ over k = first … last − 1.

    left and right: pointers to rows [BLOCK_N, 1] and to columns [1, BLOCK_C].
    """
    right += (first + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None] * stride_rk
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(left + k[None, :] * stride_lk, mask=row_ok & (k < last)[None, :], other=0.0)
        b = tl.load(right, mask=column_ok & (k < last)[:, None], other=0.0)
        right += tl.cast(stride_rk, tl.int64) * BLOCK_K  # not a product of 64 bits for every row of a step
        acc = tl.dot(a, b, acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_C]
    return acc
