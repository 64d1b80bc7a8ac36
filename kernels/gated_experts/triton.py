"""Triton kernels of the gated sum of low-rank experts, and their launchers.

    shrink    H = x A_catᵀ [N, T·r], the gate values z [G, T] and what the gates saw x̄ [G, d_in]
    expand    y = x W₀ᵀ + b + (z ⊙ H) B_cat, in one accumulator; with swapped roles also the gradient of x
    upstream  u = dy B_catᵀ and the row sums of u ⊙ H per expert: the backward of the gates

Each is one launch.  Tokens are numbered n = 0 … N − 1 and share a gate by `group`: token n has the gate
values z[n // group], so that a group is one token, one sample or the whole batch.  All sums run in fp32, none
through atomics: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mingle.kernels import tiles
from mingle.kernels.gated_experts.grouped import pooled_gates

# One program of the shrink launch computes the gates of a group; larger groups, and gates of more experts,
# are pooled before it.
_MAX_POOL_ELEMENTS = 1 << 19
_MAX_POOL_EXPERTS = 128


@triton.jit
def _swizzled(pid, row_tiles, column_tiles, BAND: tl.constexpr):
    """Tile (row, column) of program `pid`.

    Programs that run together work on bands of BAND row tiles, and so share operands in L2.
    """
    per_band = BAND * column_tiles
    first = (pid // per_band) * BAND
    rows = min(row_tiles - first, BAND)
    return first + (pid % per_band) % rows, (pid % per_band) // rows


@triton.jit
def _any_active(z_ptr, T, groups, row_ok, first, last, BLOCK_E: tl.constexpr):
    """Whether a gate of experts first … last is non-zero for any of the rows."""
    flag = 0
    for start in range(first, last + 1, BLOCK_E):
        experts = start + tl.arange(0, BLOCK_E)
        ok = row_ok[:, None] & (experts <= last)[None, :]
        z = tl.load(z_ptr + groups[:, None] * T + experts[None, :], mask=ok, other=0.0)  # [BLOCK_N, BLOCK_E]
        flag += tl.sum(tl.sum((z != 0).to(tl.int32), 1), 0)
    return flag > 0


@triton.jit
def _token_gates(
    x_ptr, stride_xn, stride_xk,
    w_ptr, stride_wt, stride_wk,
    beta_ptr,
    z_ptr,
    row_tile, N, K, T,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = x wᵀ + β for one row tile and all experts."""
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xn
    for first in range(0, T, BLOCK_T):
        experts = first + tl.arange(0, BLOCK_T)
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_rows + k[None, :] * stride_xk, mask=(rows < N)[:, None] & (k < K)[None, :], other=0.0
            )
            w = tl.load(
                w_ptr + experts[None, :] * stride_wt + k[:, None] * stride_wk,
                mask=(experts < T)[None, :] & (k < K)[:, None],
                other=0.0,
            )
            if UPCAST:
                x = x.to(tl.float32)
            # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_T]
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
        acc += tl.load(beta_ptr + experts, mask=experts < T, other=0.0).to(tl.float32)[None, :]
        tl.store(
            z_ptr + rows.to(tl.int64)[:, None] * T + experts[None, :],
            acc,
            mask=(rows < N)[:, None] & (experts < T)[None, :],
        )


@triton.jit
def _pooled_gates(
    x_ptr, stride_xn, stride_xk,
    w_ptr, stride_wt, stride_wk,
    beta_ptr,
    mask_ptr,
    z_ptr,
    pooled_ptr,
    group_index, K, T, group,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """x̄ and z = x̄ wᵀ + β of one group, x̄ the mean over the group's valid tokens."""
    start = tl.cast(group_index, tl.int64) * group
    experts = tl.arange(0, BLOCK_E)
    token_blocks = tl.cdiv(group, BLOCK_G)
    size = tl.zeros([BLOCK_G], tl.float32) + group
    if HAS_MASK:
        size = tl.zeros([BLOCK_G], tl.float32)
        for block in range(token_blocks):
            tokens = block * BLOCK_G + tl.arange(0, BLOCK_G)
            size += tl.sum(
                (tl.load(mask_ptr + start + tokens, mask=tokens < group, other=0) != 0).to(tl.float32), 0
            )
    count = tl.maximum(tl.max(size, 0), 1.0)
    z = tl.zeros([BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    # One flat loop over (columns, tokens), so that it can be pipelined: one program reads all of its group
    # and lives on loads in flight.
    for step in tl.range(0, tl.cdiv(K, BLOCK_C) * token_blocks, num_stages=4):
        block = step % token_blocks
        tokens = block * BLOCK_G + tl.arange(0, BLOCK_G)
        k = (step // token_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        valid = tokens < group
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + start + tokens, mask=valid, other=0) != 0)
        # a masked load, not a product: padding may hold anything, NaN included
        x = tl.load(
            x_ptr + (start + tokens)[:, None] * stride_xn + k[None, :] * stride_xk,
            mask=valid[:, None] & (k < K)[None, :],
            other=0.0,
        )
        total = tl.where(block == 0, 0.0, total) + tl.sum(x.to(tl.float32), 0)
        last = k < tl.where(block == token_blocks - 1, K, 0)
        mean = total / count  # [BLOCK_C]
        tl.store(pooled_ptr + tl.cast(group_index, tl.int64) * K + k, mean, mask=last)
        w = tl.load(
            w_ptr + experts[:, None] * stride_wt + k[None, :] * stride_wk,
            mask=(experts < T)[:, None] & last[None, :],
            other=0.0,
        )
        z += tl.sum(w.to(tl.float32) * tl.where(last, mean, 0.0)[None, :], 1)
    z += tl.load(beta_ptr + experts, mask=experts < T, other=0.0).to(tl.float32)
    tl.store(z_ptr + tl.cast(group_index, tl.int64) * T + experts, z, mask=experts < T)


@triton.jit(do_not_specialize=["N", "group", "gate_programs"])
def shrink_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    a_ptr, stride_at, stride_ar, stride_ak,  # [T, r, K]
    w_ptr, stride_wt, stride_wk,  # [T, K] gate weights
    beta_ptr,  # [T]
    mask_ptr,  # [N] bool
    z_ptr,  # [G, T] fp32: written where GATES, read where SKIP
    pooled_ptr,  # [G, K] fp32: written by pooled gates
    h_ptr,  # [N, T·r]
    N, K, T, r, group, gate_programs,
    GATES: tl.constexpr,  # "none", "token" or "pooled"
    HAS_MASK: tl.constexpr, SKIP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """H = x A_catᵀ; the first `gate_programs` programs compute the gates.

    A tile is BLOCK_C columns of H; gates are computed for BLOCK_E experts from BLOCK_G tokens at a time.
    """
    pid = tl.program_id(0)
    if pid < gate_programs:
        if GATES == "token":
            _token_gates(
                x_ptr, stride_xn, stride_xk, w_ptr, stride_wt, stride_wk, beta_ptr, z_ptr,
                pid, N, K, T, BLOCK_N, BLOCK_K, 16, UPCAST, PRECISION,
            )  # fmt: skip
        if GATES == "pooled":
            _pooled_gates(
                x_ptr, stride_xn, stride_xk, w_ptr, stride_wt, stride_wk, beta_ptr, mask_ptr, z_ptr,
                pooled_ptr, pid, K, T, group, BLOCK_G, 64, BLOCK_E, HAS_MASK,
            )  # fmt: skip
    else:
        R = T * r
        row_tiles = tl.cdiv(N, BLOCK_N)
        row_tile, column_tile = _swizzled(pid - gate_programs, row_tiles, tl.cdiv(R, BLOCK_C), 8)
        rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        steps = tl.cdiv(K, BLOCK_K)
        if SKIP:
            last = min((column_tile + 1) * BLOCK_C, R) - 1
            active = _any_active(
                z_ptr, T, (rows // group).to(tl.int64), rows < N, column_tile * BLOCK_C // r, last // r, 16
            )
            steps = tl.where(active, steps, 0)  # a bound, not a branch: the loop stays pipelined
        x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xn
        a_columns = a_ptr + ((columns // r).to(tl.int64) * stride_at + (columns % r) * stride_ar)[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for step in range(steps):
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_rows + k[None, :] * stride_xk, mask=(rows < N)[:, None] & (k < K)[None, :], other=0.0
            )
            a = tl.load(
                a_columns + k[:, None] * stride_ak, mask=(columns < R)[None, :] & (k < K)[:, None], other=0.0
            )
            acc = tl.dot(x, a, acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_C]
        tl.store(
            h_ptr + rows.to(tl.int64)[:, None] * R + columns[None, :],
            acc.to(h_ptr.dtype.element_ty),
            mask=(rows < N)[:, None] & (columns < R)[None, :],
        )


@triton.jit
def _add_expert(
    acc, h_rows, up_columns, stride_ut, stride_ur, z_rows, row_in, column_in, expert, chunk, r,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (z_i ⊙ H_i) up_i over BLOCK_R ranks of expert i.

    H is stored ungated: a gate near 0 could not be divided out again.
    """
    j = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    z = tl.load(z_rows + expert, mask=row_in, other=0.0)
    h = tl.load(h_rows + (expert * r + j)[None, :], mask=row_in[:, None] & (j < r)[None, :], other=0.0)
    up = tl.load(
        up_columns + tl.cast(expert, tl.int64) * stride_ut + j[:, None] * stride_ur,
        mask=column_in[None, :] & (j < r)[:, None],
        other=0.0,
    )
    gated = (h.to(tl.float32) * z[:, None]).to(h.dtype)
    return tl.dot(gated, up, acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_R] @ [BLOCK_R, BLOCK_O]


@triton.jit(do_not_specialize=["N", "group"])
def expand_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    w_ptr, stride_wo, stride_wk,  # [O, K]
    bias_ptr,  # [O]
    h_ptr, stride_hn,  # [N, T·r], columns contiguous
    up_ptr, stride_ut, stride_ur, stride_uo,  # [T, r, O]
    z_ptr, stride_zg,  # [G, T] fp32
    share_ptr,  # [G, T] fp32: the gate gradient's share of one token
    gate_ptr, stride_gt, stride_go,  # [T, O] gate weights
    mask_ptr,  # [N] bool
    y_ptr,  # [N, O]
    N, K, O, T, r, group,
    HAS_BIAS: tl.constexpr, HAS_SHARE: tl.constexpr, HAS_MASK: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + b + (z ⊙ H) up [+ share · gate], everything in one accumulator."""
    row_tile, column_tile = _swizzled(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(O, BLOCK_O), 8)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    row_ok, column_ok = (rows < N)[:, None], (columns < O)[None, :]
    long_rows = rows.to(tl.int64)
    groups = (rows // group).to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)

    x_rows = x_ptr + long_rows[:, None] * stride_xn
    w_columns = w_ptr + columns.to(tl.int64)[None, :] * stride_wo
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :] * stride_xk, mask=row_ok & (k < K)[None, :], other=0.0)
        w = tl.load(
            w_columns + k.to(tl.int64)[:, None] * stride_wk, mask=column_ok & (k < K)[:, None], other=0.0
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_O]

    h_rows = h_ptr + long_rows[:, None] * stride_hn
    up_columns = up_ptr + columns[None, :] * stride_uo
    z_rows = z_ptr + groups * stride_zg
    if SKIP:
        # Thirty-two gates at a time as the bits of one word: the loop visits the set ones only.
        for first in range(0, T, 32):
            lanes = tl.arange(0, 32)
            tile = tl.load(
                z_rows[:, None] + (first + lanes)[None, :],
                mask=row_ok & (first + lanes < T)[None, :],
                other=0.0,
            )
            used = tl.max((tile != 0).to(tl.int32), 0).to(tl.int64)  # [32]
            bits = tl.sum(used << lanes.to(tl.int64), 0)
            for _ in range(tl.sum(used, 0).to(tl.int32)):
                lowest = bits & -bits
                bits = bits ^ lowest
                expert = first + (tl.log2(lowest.to(tl.float32)) + 0.5).to(tl.int32)
                for chunk in tl.static_range(CHUNKS):
                    acc = _add_expert(
                        acc, h_rows, up_columns, stride_ut, stride_ur, z_rows, rows < N, columns < O,
                        expert, chunk, r, BLOCK_R, PRECISION,
                    )  # fmt: skip
    else:
        for step in range(T * CHUNKS):
            acc = _add_expert(
                acc, h_rows, up_columns, stride_ut, stride_ur, z_rows, rows < N, columns < O,
                step // CHUNKS, step % CHUNKS, r, BLOCK_R, PRECISION,
            )  # fmt: skip

    if HAS_SHARE:
        counted = row_ok
        if HAS_MASK:
            counted = counted & (tl.load(mask_ptr + rows, mask=rows < N, other=0) != 0)[:, None]
        for first in range(0, T, 16):
            experts = first + tl.arange(0, 16)
            share = tl.load(
                share_ptr + groups[:, None] * T + experts[None, :],
                mask=counted & (experts < T)[None, :],
                other=0.0,
            )
            gate = tl.load(
                gate_ptr + experts[:, None] * stride_gt + columns[None, :] * stride_go,
                mask=(experts < T)[:, None] & column_ok,
                other=0.0,
            )
            # [BLOCK_N, 16] @ [16, BLOCK_O]
            acc = tl.dot(share.to(gate.dtype), gate, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < O, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + long_rows[:, None] * O + columns[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=row_ok & column_ok,
    )


@triton.jit(do_not_specialize=["N", "group"])
def upstream_kernel(
    dy_ptr, stride_dn, stride_do,  # [N, O]
    b_ptr, stride_bt, stride_bo, stride_br,  # [T, O, r]
    h_ptr, stride_hn,  # [N, T·r], columns contiguous; not read where SKIP
    z_ptr,  # [G, T] fp32, read where SKIP
    u_ptr,  # [N, T·r]
    dz_ptr,  # [N, T] fp32, not written where SKIP
    N, O, T, r, group,
    SKIP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u = dy B_i of one expert and, before u is rounded, the sums over its columns of u ⊙ H."""
    expert = tl.program_id(0) % T
    rows = (tl.program_id(0) // T) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (rows < N)[:, None]
    long_rows = rows.to(tl.int64)
    dy_rows = dy_ptr + long_rows[:, None] * stride_dn
    end = O
    if SKIP:
        active = _any_active(z_ptr, T, (rows // group).to(tl.int64), rows < N, expert, expert, 16)
        end = tl.where(active, O, 0)
    dz = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, r, BLOCK_R):
        j = first + tl.arange(0, BLOCK_R)
        b_columns = b_ptr + expert.to(tl.int64) * stride_bt + j[None, :] * stride_br
        acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for o0 in range(0, end, BLOCK_K):
            o = o0 + tl.arange(0, BLOCK_K)
            dy = tl.load(dy_rows + o[None, :] * stride_do, mask=row_ok & (o < O)[None, :], other=0.0)
            b = tl.load(
                b_columns + o[:, None] * stride_bo, mask=(o < O)[:, None] & (j < r)[None, :], other=0.0
            )
            acc = tl.dot(dy, b, acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_R]
        ok = row_ok & (j < r)[None, :]
        if not SKIP:
            h = tl.load(
                h_ptr + long_rows[:, None] * stride_hn + (expert * r + j)[None, :], mask=ok, other=0.0
            )
            dz += tl.sum(acc * h.to(tl.float32), 1)
        tl.store(
            u_ptr + long_rows[:, None] * (T * r) + (expert * r + j)[None, :],
            acc.to(u_ptr.dtype.element_ty),
            mask=ok,
        )
    if not SKIP:
        tl.store(dz_ptr + long_rows * T + expert, dz, mask=rows < N)


def shrink(
    x: torch.Tensor,
    A: torch.Tensor,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    gates: torch.Tensor | None,
    mask: torch.Tensor | None,
    group: int,
    skip: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H = x A_catᵀ, the gate values and what the gates saw.

    Args:
        x: [N, K], N > 0, any strides.
        A: [T, r, K], T > 0, any strides.
        gate_weight: of linear gates, [T, K], any strides; None where `gates` is given.
        gate_bias: [T], contiguous; None where `gates` is given.
        gates: [G, T] fp32, contiguous, given gate values.
        mask: bool [N], contiguous, tokens that count in the mean of their group.
        group: tokens per gate row; 1 for gates of single tokens.
        skip: leave H at 0 where all given gates of a tile are 0.

    Returns:
        H [N, T·r] in x's dtype, z [G, T] fp32, x̄ [G, K] fp32 (no rows where a group is one token or gates
        are given).
    """
    x, A = tiles.addressable(x, 1), tiles.addressable(A, 1, 2)
    (tokens, width), (experts, rank) = x.shape, A.shape[:2]
    hidden = x.new_empty(tokens, experts * rank)
    pooled = x.new_empty(0, width, dtype=torch.float32)
    how, gate_programs = "none", 0
    if gates is None:
        assert gate_weight is not None and gate_bias is not None
        groups = triton.cdiv(tokens, group)
        if group == 1 and mask is None:
            how = "token"
            gates = x.new_empty(tokens, experts, dtype=torch.float32)
        elif group * width <= _MAX_POOL_ELEMENTS and experts <= _MAX_POOL_EXPERTS:
            how, gate_programs = "pooled", groups
            gates = x.new_empty(groups, experts, dtype=torch.float32)
            pooled = x.new_empty(groups, width, dtype=torch.float32)
        else:
            gates, pooled = pooled_gates(x, gate_weight, gate_bias, mask, group)
    upcast = gate_weight is not None and gate_weight.dtype != x.dtype
    skip = skip and how == "none"
    strain = tiles.strain((x, A), (width,), special=skip or upcast or rank % 16 > 0)
    tile = tiles.choose("shrink", x, tokens, experts * rank, width, strain)
    if how == "token":
        gate_programs = triton.cdiv(tokens, tile.rows)
    weight = x if gate_weight is None else tiles.addressable(gate_weight, 0, 1)
    grid = (gate_programs + triton.cdiv(tokens, tile.rows) * triton.cdiv(experts * rank, tile.columns),)
    with tiles.on_device(x):
        shrink_kernel[grid](
            x, *x.stride(),
            A, *A.stride(),
            weight, *weight.stride(),
            gate_bias,
            mask,
            gates,
            pooled,
            hidden,
            tokens, width, experts, rank, group, gate_programs,
            GATES=how,
            HAS_MASK=mask is not None, SKIP=skip, UPCAST=upcast,
            BLOCK_N=tile.rows, BLOCK_C=tile.columns, BLOCK_K=tile.depth,
            BLOCK_E=triton.next_power_of_2(experts), BLOCK_G=min(triton.next_power_of_2(group), 64),
            PRECISION=tiles.precision(x), **tiles.options(tile),
        )  # fmt: skip
    return hidden, gates, pooled


def expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
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
        hidden: H [N, T·r], contiguous columns.
        up: [T, r, O], any strides.
        z: [G, T] fp32, contiguous columns.
        group: tokens per gate row.
        skip: pass over experts whose gates are 0 for a whole tile.
        keep: `hidden` is needed afterwards; this kernel leaves it as it is in any case.
        share: [G, T] fp32, contiguous; reaches the tokens that `mask` [N], contiguous, lets through.
        gate_weight: [T, O], any strides; needed with `share`.

    Returns:
        y [N, O] in x's dtype.
    """
    x, up = tiles.addressable(x, 1), tiles.addressable(up, 1, 2)
    (tokens, width), (outputs, _), (experts, rank, _) = x.shape, weight.shape, up.shape
    y = x.new_empty(tokens, outputs)
    gate = weight
    if gate_weight is not None:
        gate = tiles.addressable(gate_weight.to(x.dtype), 0, 1)  # y is rounded to it anyway
    strain = tiles.strain((x, weight, up), (width, outputs), special=skip or rank % 16 > 0)
    tile = tiles.choose("expand", x, tokens, outputs, width + experts * rank, strain)
    block_rank = tiles.rank_block(rank, tile.depth)
    with tiles.on_device(x):
        expand_kernel[(triton.cdiv(tokens, tile.rows) * triton.cdiv(outputs, tile.columns),)](
            x, *x.stride(),
            weight, *weight.stride(),
            bias,
            hidden, hidden.stride(0),
            up, *up.stride(),
            z, z.stride(0),
            share,
            gate, *gate.stride(),
            mask,
            y,
            tokens, width, outputs, experts, rank, group,
            HAS_BIAS=bias is not None, HAS_SHARE=share is not None, HAS_MASK=mask is not None, SKIP=skip,
            BLOCK_N=tile.rows, BLOCK_O=tile.columns, BLOCK_K=tile.depth, BLOCK_R=block_rank,
            CHUNKS=triton.cdiv(rank, block_rank), PRECISION=tiles.precision(x), **tiles.options(tile),
        )  # fmt: skip
    return y


def upstream(
    dy: torch.Tensor, B: torch.Tensor, hidden: torch.Tensor, z: torch.Tensor, group: int, skip: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """u = dy B_catᵀ and the sums of u ⊙ H over each expert's columns.

    Args:
        dy: [N, O], N > 0, any strides.
        B: [T, O, r], T > 0, any strides.
        hidden: H [N, T·r], contiguous columns; not read with `skip`.
        z: [G, T] fp32, contiguous; read with `skip` only.
        group: tokens per gate row.
        skip: leave u at 0 where all gates of a tile are 0, and the sums out.

    Returns:
        u [N, T·r] in dy's dtype, and the sums dz [N, T] fp32 (no rows with `skip`).
    """
    dy, B = tiles.addressable(dy, 1), tiles.addressable(B, 1, 2)
    (tokens, outputs), (experts, _, rank) = dy.shape, B.shape
    u = dy.new_empty(tokens, experts * rank)
    dz = dy.new_empty(0 if skip else tokens, experts, dtype=torch.float32)
    strain = tiles.strain((dy, B), (outputs,), special=skip or rank % 16 > 0)
    tile = tiles.choose("upstream", dy, tokens, experts * rank, outputs, strain)
    with tiles.on_device(dy):
        upstream_kernel[(triton.cdiv(tokens, tile.rows) * experts,)](
            dy, *dy.stride(),
            B, *B.stride(),
            hidden, hidden.stride(0),
            z,
            u,
            dz,
            tokens, outputs, experts, rank, group,
            SKIP=skip,
            BLOCK_N=tile.rows, BLOCK_R=tiles.rank_block(rank, tile.columns), BLOCK_K=tile.depth,
            PRECISION=tiles.precision(dy), **tiles.options(tile),
        )  # fmt: skip
    return u, dz
