"""Triton kernel for W_eff = W₀ + Σ_i g_i B_i A_i: one weight for many tokens that share their gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mingle.kernels import launches, tiles


@triton.jit
def fold_kernel(
    w_ptr, stride_wo, stride_wk,  # [O, K]
    a_ptr, stride_at, stride_ar, stride_ak,  # [T, r, K]
    b_ptr, stride_bt, stride_bo, stride_br,  # [T, O, r]
    g_ptr,  # [T] fp32
    y_ptr,  # [O, K]
    O, K, T, r,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // column_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = (tl.program_id(0) % column_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_ok, column_ok = (rows < O)[:, None], (columns < K)[None, :]
    long_rows = rows.to(tl.int64)
    acc = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    for step in range(T * CHUNKS):
        expert = tl.cast(step // CHUNKS, tl.int64)
        j = (step % CHUNKS) * BLOCK_R + tl.arange(0, BLOCK_R)
        b = tl.load(
            b_ptr + expert * stride_bt + long_rows[:, None] * stride_bo + j[None, :] * stride_br,
            mask=row_ok & (j < r)[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + expert * stride_at + j[:, None] * stride_ar + columns[None, :] * stride_ak,
            mask=(j < r)[:, None] & column_ok,
            other=0.0,
        )
        gated = (b.to(tl.float32) * tl.load(g_ptr + expert)).to(b.dtype)
        acc = tl.dot(gated, a, acc, input_precision=PRECISION)  # [BLOCK_O, BLOCK_R] @ [BLOCK_R, BLOCK_K]
    w = tl.load(
        w_ptr + long_rows[:, None] * stride_wo + columns[None, :] * stride_wk,
        mask=row_ok & column_ok,
        other=0.0,
    )
    tl.store(
        y_ptr + long_rows[:, None] * K + columns[None, :],
        (acc + w.to(tl.float32)).to(y_ptr.dtype.element_ty),
        mask=row_ok & column_ok,
    )


@launches.repeated
def fold(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """W_eff = W₀ + Σ_i g_i B_i A_i in a new tensor.

    weight [O, K], A [T, r, K] with T > 0, B [T, O, r], all of any strides; gates [T] fp32, contiguous →
    [O, K] in weight's dtype, summed in fp32.
    """
    weight, A, B = tiles.addressable(weight, 1), tiles.addressable(A, 1, 2), tiles.addressable(B, 2)
    (outputs, width), (experts, rank) = weight.shape, A.shape[:2]
    folded = weight.new_empty(outputs, width)
    strain = tiles.strain((weight, A, B), (outputs, width), special=rank % 16 > 0)
    tile = tiles.choose("fold", weight, outputs, width, experts * rank, strain)
    block_rank = tiles.rank_block(rank, tile.depth)
    with tiles.on_device(weight):
        launches.launch(
            fold_kernel, (tiles.cdiv(outputs, tile.rows) * tiles.cdiv(width, tile.columns),),
            weight, *weight.stride(),
            A, *A.stride(),
            B, *B.stride(),
            gates,
            folded,
            outputs, width, experts, rank,
            BLOCK_O=tile.rows, BLOCK_K=tile.columns, BLOCK_R=block_rank, CHUNKS=tiles.cdiv(rank, block_rank),
            PRECISION=tiles.precision(weight), **tiles.options(tile),
        )  # fmt: skip
    return folded
