"""Triton kernels for the null-space constraint with adaptive relaxation (MINGLE Eqs. 8–11).

All layers, of any widths and ranks, at once:

    r_p = mean_n |G_n u_p| / (‖G_n‖ + 1e-12),  S ← β S + (1−β) r,  λ = exp(−γ S),  G ← G − (G U) diag(λ) Uᵀ

Two launches whatever the number of layers: the first measures G U, ‖G‖ and whether G is finite; the second,
which must know that of all layers, advances S and projects.  Nothing is read on the host, so both can be
captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mingle.kernels import launches, tiles

_TILE = 8192  # elements of a tile of a basis


@triton.jit
def measure_kernel(
    g_ptr,  # fp32: per layer [n, d]
    table_ptr,  # int64 [L, 6]
    u_ptr,  # fp32: per layer [K, d], directions as rows
    along_ptr,  # fp32 [L, ROWS, BLOCK_K]
    norm_ptr,  # fp32 [L, ROWS]
    flag_ptr,  # fp32 [L, ROWS]: 1 where a gradient is not finite
    ROWS,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    layer, row = tl.program_id(0), tl.program_id(1)
    entry = table_ptr + layer * 6
    start, n, d = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    K, basis = tl.load(entry + 3), tl.load(entry + 4)
    place = layer * ROWS + row
    directions = tl.arange(0, BLOCK_K)
    along = tl.zeros([BLOCK_K], tl.float32)
    square = 0.0
    broken = 0.0
    if row < n:
        for first in range(0, d, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            g = tl.load(g_ptr + start + row * d + columns, mask=columns < d, other=0.0)
            u = tl.load(
                u_ptr + basis + directions[:, None] * d + columns[None, :],
                mask=(directions < K)[:, None] & (columns < d)[None, :],
                other=0.0,
            )
            broken += tl.sum((g - g != 0.0).to(tl.float32))  # NaN for NaN and for infinities
            square += tl.sum(g * g)
            along += tl.sum(u * g[None, :], 1)
    tl.store(along_ptr + place * BLOCK_K + directions, along)
    tl.store(norm_ptr + place, tl.sqrt(square))
    tl.store(flag_ptr + place, tl.minimum(broken, 1.0))


@triton.jit
def project_kernel(
    g_ptr,  # fp32: per layer [n, d], changed in place
    table_ptr,  # int64 [L, 6]
    u_ptr,  # fp32: per layer [K, d]
    s_ptr,  # fp32: per layer [K], changed in place
    along_ptr,  # fp32 [L, ROWS, BLOCK_K]
    norm_ptr,  # fp32 [L, ROWS]
    flag_ptr,  # fp32 [L, ROWS]
    L, ROWS, gamma, beta,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    broken = 0.0
    for flag in range(0, L * ROWS, BLOCK_F):
        flags = flag + tl.arange(0, BLOCK_F)
        broken += tl.sum(tl.load(flag_ptr + flags, mask=flags < L * ROWS, other=0.0))
    entry = table_ptr + layer * 6
    start, n, d = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    K, basis = tl.load(entry + 3), tl.load(entry + 4)
    if (broken == 0) & (n > 0):
        directions = tl.arange(0, BLOCK_K)
        known = directions < K
        ratio = tl.zeros([BLOCK_K], tl.float32)
        for row in range(n):
            place = layer * ROWS + row
            ratio += tl.abs(tl.load(along_ptr + place * BLOCK_K + directions)) / (
                tl.load(norm_ptr + place) + 1e-12
            )
        s = s_ptr + tl.load(entry + 5) + directions
        advanced = beta * tl.load(s, mask=known, other=0.0) + (1 - beta) * ratio / n.to(tl.float32)
        tl.store(s, advanced, mask=known)
        strength = tl.exp(-gamma * advanced)
        for row in range(n):
            gone = strength * tl.load(along_ptr + (layer * ROWS + row) * BLOCK_K + directions)
            for first in range(0, d, BLOCK_D):
                columns = first + tl.arange(0, BLOCK_D)
                u = tl.load(
                    u_ptr + basis + directions[:, None] * d + columns[None, :],
                    mask=known[:, None] & (columns < d)[None, :],
                    other=0.0,
                )
                g = g_ptr + start + row * d + columns
                kept = tl.load(g, mask=columns < d, other=0.0) - tl.sum(gone[:, None] * u, 0)
                tl.store(g, kept, mask=columns < d)


@launches.repeated
def project_(
    gradients: torch.Tensor,
    table: torch.Tensor,
    bases: torch.Tensor,
    interference: torch.Tensor,
    gamma: float,
    beta: float,
    rows: int,
    directions: int,
) -> torch.Tensor:
    """Advance S of all layers and project their gradients in place, unless one of them is not finite.

    Args:
        gradients: fp32, one after another, each [n, d].
        table: int64 [L, 6], of each layer: where its gradient begins, its rows n, its width d, its directions
            K, and where its basis and its S begin.
        bases: fp32, one after another, each Uᵀ [K, d], orthonormal.
        interference: S, fp32, one after another, each [K].
        rows, directions: the largest n and K.

    Returns:
        fp32 [L, rows]: 1 for every row that is not finite.  Where there is one, nothing else has changed.
    """
    layers = len(table)
    block_k = max(16, tiles.next_power_of_2(directions))
    block_d = max(16, _TILE // block_k)
    along = gradients.new_empty(layers, rows, block_k)
    norms = gradients.new_empty(layers, rows)
    flags = gradients.new_empty(layers, rows)
    options = tiles.options(tiles.Tile(block_k, block_d, 0, warps=8, stages=2))
    tile = {"BLOCK_K": block_k, "BLOCK_D": block_d, **options}
    with tiles.on_device(gradients):
        launches.launch(
            measure_kernel, (layers, rows), gradients, table, bases, along, norms, flags, rows, **tile
        )
        launches.launch(
            project_kernel, (layers,),
            gradients, table, bases, interference, along, norms, flags,
            layers, rows, gamma, beta, BLOCK_F=256, **tile,
        )  # fmt: skip
    return flags
