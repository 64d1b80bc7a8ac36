"""Triton kernels for the gate values z = x̄ wᵀ + β, and their launcher.

Gates are computed apart from the products: one pass over x, which leaves it in the cache for the next launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mingle.kernels import launches, tiles

_COLUMNS = 128  # of x that one program sums up
_TOKENS = 64  # of one step
_PARTS = 8  # of a group that are added up at once
_MANY_TOKENS = 512  # from which on their gates are a matrix product
_GATE_ROWS, _GATE_EXPERTS = 32, 32  # of one program of that


@triton.jit(do_not_specialize=["N"])
def token_gates_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    w_ptr, stride_wt, stride_wk,  # [T, K]
    beta_ptr,  # [T]
    z_ptr,  # [N, T] fp32
    N, K, T,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    PIECES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = x wᵀ + β of a block of tokens and experts."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    row_ok, expert_ok = (rows < N)[:, None], (experts < T)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + long_rows * stride_xn + k[None, :] * stride_xk, mask=row_ok & (k < K)[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + experts[None, :] * stride_wt + k[:, None] * stride_wk,
            mask=expert_ok & (k < K)[:, None],
            other=0.0,
        )
        # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_E]
        if PIECES:
            w = w.to(tl.float32)
            for _ in tl.static_range(3):  # 24 bits of w, eight at a time
                piece = w.to(x.dtype)
                acc = tl.dot(x, piece, acc)
                w -= piece.to(tl.float32)
        elif UPCAST:
            acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    acc += tl.load(beta_ptr + experts, mask=experts < T, other=0.0).to(tl.float32)[None, :]
    tl.store(z_ptr + long_rows * T + experts[None, :], acc, mask=row_ok & expert_ok)


@triton.jit(do_not_specialize=["G", "group", "part"])
def pool_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    mask_ptr,  # [N] bool
    sums_ptr,  # [parts, G, K] fp32
    G, K, group, part,
    HAS_MASK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums over the valid tokens of `part` tokens of one group."""
    place = tl.program_id(0).to(tl.int64)
    begin = (place // G).to(tl.int32) * part
    end = min(begin + part, group)
    start = (place % G) * group
    k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)  # added up across threads once, after the loop
    for first in range(begin, end, BLOCK_G):
        tokens = first + tl.arange(0, BLOCK_G)
        valid = tokens < end
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + start + tokens, mask=valid, other=0) != 0)
        # a masked load, not a product: padding may hold anything, NaN included
        x = tl.load(
            x_ptr + (start + tokens)[:, None] * stride_xn + k[None, :] * stride_xk,
            mask=valid[:, None] & (k < K)[None, :],
            other=0.0,
        )
        total += x.to(tl.float32)
    tl.store(sums_ptr + place * K + k, tl.sum(total, 0), mask=k < K)


@triton.jit(do_not_specialize=["G", "group", "parts"])
def row_gates_kernel(
    sums_ptr, stride_sg, stride_sk,  # [parts, G, K]
    mask_ptr,  # [N] bool
    w_ptr, stride_wt, stride_wk,  # [T, K]
    beta_ptr,  # [T]
    z_ptr,  # [G, T] fp32
    pooled_ptr,  # [G, K] fp32, written where POOLED
    G, K, T, group, parts,
    HAS_MASK: tl.constexpr, POOLED: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """x̄ and z = x̄ wᵀ + β of one group, x̄ the mean over the group's valid tokens."""
    place = tl.program_id(0).to(tl.int64)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    size = tl.zeros([BLOCK_G], tl.float32) + group
    if HAS_MASK:
        size = tl.zeros([BLOCK_G], tl.float32)
        for first in range(0, group, BLOCK_G):
            tokens = first + tl.arange(0, BLOCK_G)
            valid = tl.load(mask_ptr + place * group + tokens, mask=tokens < group, other=0) != 0
            size += tl.sum(valid.to(tl.float32), 0)
    count = tl.maximum(tl.max(size, 0), 1.0)
    z = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, K, BLOCK_C):
        k = first + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_C], tl.float32)
        for one in range(0, parts, BLOCK_P):
            several = one + tl.arange(0, BLOCK_P)
            rows = (several.to(tl.int64) * G + place)[:, None] * stride_sg
            ok = (several < parts)[:, None] & (k < K)[None, :]
            part = tl.load(sums_ptr + rows + k[None, :] * stride_sk, mask=ok, other=0.0)  # [BLOCK_P, BLOCK_C]
            total += tl.sum(part.to(tl.float32), 0)
        mean = total / count
        if POOLED and tl.program_id(1) == 0:
            tl.store(pooled_ptr + place * K + k, mean, mask=k < K)
        w = tl.load(
            w_ptr + experts[:, None] * stride_wt + k[None, :] * stride_wk,
            mask=(experts < T)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        z += tl.sum(w.to(tl.float32) * mean[None, :], 1)
    z += tl.load(beta_ptr + experts, mask=experts < T, other=0.0).to(tl.float32)
    tl.store(z_ptr + place * T + experts, z, mask=experts < T)


@launches.repeated
def gates(
    x: torch.Tensor, gate_weight: torch.Tensor, gate_bias: torch.Tensor, mask: torch.Tensor | None, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of linear gates and what they saw.

    Args:
        x: [N, K], N > 0, any strides.
        gate_weight: [T, K], T > 0, any strides.
        gate_bias: [T], contiguous.
        mask: bool [N], contiguous, tokens that count in the mean of their group.
        group: tokens per gate row; 1 for gates of single tokens.

    Returns:
        z [G, T] fp32, x̄ [G, K] fp32 (no rows where a group is one token without a mask).
    """
    x, gate_weight = tiles.addressable(x, 1), tiles.addressable(gate_weight, 0, 1)
    (tokens, width), experts = x.shape, len(gate_weight)
    groups = tiles.cdiv(tokens, group)
    z = x.new_empty(groups, experts, dtype=torch.float32)
    single = group == 1 and mask is None
    pooled = x.new_empty(0 if single else groups, width, dtype=torch.float32)
    with tiles.on_device(x):
        if single and tokens >= _MANY_TOKENS:
            rows = _GATE_ROWS if tokens >= _GATE_ROWS * 4 * tiles.chip(x.device).multiprocessors else 16
            exact = _exact_product(x, gate_weight)
            wide = exact["UPCAST"]
            tile = tiles.Tile(rows, _GATE_EXPERTS, 64 if wide else 128, warps=4, stages=4 if wide else 3)
            launches.launch(
                token_gates_kernel, (tiles.cdiv(tokens, tile.rows), tiles.cdiv(experts, tile.columns)),
                x, *x.stride(), gate_weight, *gate_weight.stride(), gate_bias, z, tokens, width, experts,
                BLOCK_N=tile.rows, BLOCK_K=tile.depth, BLOCK_E=tile.columns,
                **exact, **tiles.options(tile),
            )  # fmt: skip
            return z, pooled
        sums, parts = (x, 1) if single else _sums(x, mask, group)
        tile = tiles.Tile(min(tiles.next_power_of_2(experts), 2), 2048, 0, warps=8, stages=2)
        launches.launch(
            row_gates_kernel, (groups, tiles.cdiv(experts, tile.rows)),
            sums, *sums.stride(), mask, gate_weight, *gate_weight.stride(), gate_bias, z, pooled,
            groups, width, experts, group, parts,
            HAS_MASK=mask is not None, POOLED=not single, BLOCK_G=_TOKENS,
            BLOCK_P=min(tiles.next_power_of_2(parts), _PARTS), BLOCK_C=tile.columns, BLOCK_E=tile.rows,
            **tiles.options(tile),
        )  # fmt: skip
    return z, pooled


def _sums(x: torch.Tensor, mask: torch.Tensor | None, group: int) -> tuple[torch.Tensor, int]:
    """Sums over the valid tokens of each group in parts [parts · G, K] fp32, and how many parts."""
    tokens, width = x.shape
    groups, blocks = tiles.cdiv(tokens, group), tiles.cdiv(width, _COLUMNS)
    # few groups of many tokens are summed in parts, so that the whole chip works
    wanted = tiles.cdiv(4 * tiles.chip(x.device).multiprocessors, groups * blocks)
    part = tiles.cdiv(tiles.cdiv(group, wanted), _TOKENS) * _TOKENS
    parts = tiles.cdiv(group, part)
    sums = x.new_empty(parts * groups, width, dtype=torch.float32)
    tile = tiles.Tile(_TOKENS, _COLUMNS, 0, warps=8, stages=4)
    launches.launch(
        pool_kernel, (parts * groups, blocks),
        x, *x.stride(), mask, sums, groups, width, group, part,
        HAS_MASK=mask is not None, BLOCK_G=tile.rows, BLOCK_C=tile.columns, **tiles.options(tile),
    )  # fmt: skip
    return sums, parts


def _exact_product(x: torch.Tensor, gate_weight: torch.Tensor) -> dict[str, Any]:
    """How x wᵀ is computed without losing digits of w.

    Beside x in bf16, w is taken in three pieces of bf16; numbers of fp16 are numbers of TF32, of which three
    products are as good as one of fp32.  Both run on the matrix units.
    """
    wider = gate_weight.dtype != x.dtype
    on_units = tiles.chip(x.device).kind == "cuda" and x.dtype == torch.float16
    return {
        "PIECES": wider and x.dtype == torch.bfloat16,
        "UPCAST": wider,
        "PRECISION": tiles.precision(x) if not wider else "tf32x3" if on_units else "ieee",
    }
