"""Triton kernel for the backward of the gates, and its launcher.

It computes z ⊙ u with u = dy B_catᵀ, and the row sums of u ⊙ H per expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mingle.kernels import launches, tiles
from mingle.kernels.gated_experts import descriptors
from mingle.kernels.gated_experts.active import Active
from mingle.kernels.gated_experts.common import add_product
from mingle.kernels.gated_experts.listed import shrink_listed


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
        acc = add_product(
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


def upstream(
    dy: torch.Tensor,
    B: torch.Tensor,
    hidden: torch.Tensor,
    z: torch.Tensor,
    group: int,
    active: Active | None,
    *,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z ⊙ u with u = dy B_catᵀ, and the sums of u ⊙ H over each expert's columns.

    Args:
        dy: [N, O], N > 0, any strides.
        B: [T, O, r], T > 0, any strides.
        hidden: H [N, T·r], contiguous columns; not read with `active`.
        z: [G, T] fp32, contiguous columns.
        group: tokens per gate row.
        active: as for `mingle.kernels.gated_experts.shrink.shrink`; the sums are left out too.
        keep: z ⊙ u is needed, not the sums alone.

    Returns:
        z ⊙ u [N, T·r] in dy's dtype (no rows without `keep`), and the sums dz [N, T] fp32 (no rows with
        `active`).
    """
    if active is not None:
        return shrink_listed(dy, B.mT, z, group, active), dy.new_empty(0, len(B), dtype=torch.float32)
    return _upstream(dy, B, hidden, z, group, keep)


@launches.repeated
def _upstream(
    dy: torch.Tensor, B: torch.Tensor, hidden: torch.Tensor, z: torch.Tensor, group: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dy, B = tiles.addressable(dy, 1), tiles.addressable(B, 1, 2)
    (tokens, outputs), (experts, _, rank) = dy.shape, B.shape
    columns = experts * rank
    u = dy.new_empty(tokens if keep else 0, columns)
    dz = dy.new_empty(tokens, experts, dtype=torch.float32)
    strain = tiles.strain((dy, B), (outputs, rank), special=False)  # experts side by side in the rows of H
    flat = descriptors.flat(dy, B.mT, hidden) if keep and descriptors.sums_by_expert(rank) else None
    tile = tiles.choose("upstream", dy, tokens, columns, outputs, strain, described=flat is not None)

    def launch(tile: tiles.Tile) -> None:
        if tile.described and flat is not None:
            descriptors.shrink(dy, flat, z, group, None, u, hidden, dz, rank, tile)
            return
        tile = tile._replace(columns=min(tile.columns, 128 if dy.element_size() == 2 else 64))
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
